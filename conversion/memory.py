"""Large checkpoints with the memory of one tensor at a time.

Tensors are mapped from their files (`reading`), so they take memory only once they are looked at. What looks at all of
them does it through `one_by_one`, which lets go of each before the next.
"""

import contextlib
import ctypes
import gc
import mmap
from collections.abc import Iterator, Mapping

import torch

from vit_embed.conversion.progress import progress

# Linux's advice to write changed pages out and drop the others from memory (asm-generic/mman-common.h). They are read
# again when they are next looked at, so following it changes no number, whatever the memory holds.
MADV_PAGEOUT = 21


def one_by_one(state_dict: Mapping[str, torch.Tensor], what: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a state dict with their names; the memory of each is released when the next one is asked for.

    Args:
        what: shows a bar with this name where there are many bytes; "" shows none.
    """
    with progress(what, sum(tensor.nbytes for tensor in state_dict.values()) if what else 0) as bar:
        for name, tensor in state_dict.items():
            yield name, tensor
            _release(tensor)
            bar.update(tensor.nbytes)


def _release(tensor: torch.Tensor) -> None:
    """Drops the pages of a tensor that is mapped from a file, until it is looked at again.

    Without this, converting keeps the whole file in memory once it has read each tensor.
    """
    begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > begin and tensor.is_contiguous():
        with contextlib.suppress(AttributeError, OSError, TypeError):  # advice: a system without it keeps the memory
            ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), MADV_PAGEOUT)


def return_freed_memory() -> None:
    """Gives the memory of a model that nothing needs any more back to the system.

    Modules that refer to each other in a ring wait for Python's collector; and the C library keeps what it frees
    between two small pieces that are in use, which after a model can be all of it.
    """
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)
