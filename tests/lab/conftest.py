from tests.bench.conftest import machine

__all__ = ["machine"]
