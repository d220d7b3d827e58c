"""How fast a device multiplies matrices, measured."""

import time

import torch


def matrix_rate(
    seconds: float = 0.3, size: int = 512, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> float:
    """Floating-point operations per second of this process in products of matrices.

    The fastest of the products that fit into `seconds` counts: others were disturbed by other work on the machine.

    Args:
        seconds: how long is measured, about.
        size: rows and columns of the matrices.
        dtype: their number format.
        device: where they are multiplied.
    """
    a = torch.ones(size, size, dtype=dtype, device=device)
    b = torch.ones(size, size, dtype=dtype, device=device)

    def product() -> None:
        torch.mm(a, b)
        if a.is_cuda:
            torch.cuda.synchronize(device)  # a GPU is done only later

    product()  # The first product starts threads and is slower.
    fastest, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        product()
        fastest = min(fastest, time.perf_counter() - began)
    return 2 * size**3 / fastest
