"""Triton kernels of sparse_ce, installed as ``sparse_ce.triton_kernels``."""

if __name__ != "sparse_ce.triton_kernels":
    raise ImportError(
        f"{__name__}: these are the kernels of sparse_ce, to be imported as "
        "sparse_ce.triton_kernels; the working directory or PYTHONPATH puts the root of its "
        "repository before the package triton_kernels that you may have meant"
    )
