"""The demo on handwritten digits; artifacts name its model ``ttmpd.demo:demo_model``."""

from ttmpd.demo.digits import demo_data, demo_model

__all__ = ["demo_data", "demo_model"]
