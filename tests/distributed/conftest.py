from run_fixtures import tiny, tiny_model

__all__ = ["tiny", "tiny_model"]
