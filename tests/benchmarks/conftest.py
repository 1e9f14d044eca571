from run_fixtures import tiny_model, whole

__all__ = ["tiny_model", "whole"]
