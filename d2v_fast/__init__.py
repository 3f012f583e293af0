"""d2v_fast: data2vec pre-training, and the fused operations it is made of (``d2v_fast.ops``)."""

__version__ = "0.1.0"
