"""Block tables of the running sequences as arrays, kept up to date entry by entry."""

import numpy as np
import numpy.typing as npt

from tasuki_engine.block_pool import NULL


class BlockTables:
    """A row per running sequence in `full` and `window`, int32 [rows, blocks]: its blocks in order.

    Entries that hold no block are 0. A table whose group the model lacks is None.
    """

    def __init__(self, num_rows: int, num_blocks: int, *, full: bool, window: bool) -> None:
        shape = (num_rows, num_blocks)
        self.full = np.zeros(shape, np.int32) if full else None
        self.window = np.zeros(shape, np.int32) if window else None
        self._free = list(range(num_rows - 1, -1, -1))

    @property
    def has_room(self) -> bool:
        """Whether `take_row` can be called."""
        return bool(self._free)

    def take_row(self) -> int:
        """A row of zeros."""
        return self._free.pop()

    def free_row(self, row: int) -> None:
        """Zeroes the row and gives it back."""
        for table in (self.full, self.window):
            if table is not None:
                table[row].fill(NULL)
        self._free.append(row)


def put(table: npt.NDArray[np.int32] | None, row: int, first: int, blocks: list[int]) -> None:
    """Enters `blocks` from block number `first` on."""
    if table is not None:
        table[row, first : first + len(blocks)] = blocks
