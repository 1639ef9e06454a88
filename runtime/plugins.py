"""stub"""
from typing import Any
def register(trt: Any) -> None:
    pass
