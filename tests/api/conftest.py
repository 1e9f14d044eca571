from run_fixtures import tiny, tiny_model, whole

__all__ = ["tiny", "tiny_model", "whole"]
