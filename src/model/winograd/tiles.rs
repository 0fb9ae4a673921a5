//! A picture's tiles, and how many of them are computed together.

/// Edge of a tile's outputs, and of its inputs.
pub(super) const TILE: usize = 4;
pub(super) const PATCH: usize = 6;

/// Tiles whose sums stay in registers while the channels pass.
pub(super) const TOGETHER: usize = 6;
/// Tiles times channels of a block: half a megabyte, more beyond 256 channels.
const BLOCK_NUMBERS: usize = 3072;
const BLOCK_MIN: usize = 2 * TOGETHER;
const BLOCK_MAX: usize = 16 * TOGETHER;

/// A picture of `height` x `width`, cut into tiles in the order of reading. Those at the right and
/// lower edge may reach beyond it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Grid {
    pub(super) height: usize,
    pub(super) width: usize,
}

impl Grid {
    pub(super) fn columns(self) -> usize {
        self.width.div_ceil(TILE)
    }

    pub(super) fn tiles(self) -> usize {
        self.columns() * self.height.div_ceil(TILE)
    }

    pub(super) fn area(self) -> usize {
        self.height * self.width
    }
}

/// How many tiles are computed together: few enough that their numbers in the other basis stay in a
/// near cache, and as many for each thread.
pub(super) fn block_size(grid: Grid, channels: usize, threads: usize) -> usize {
    let most = (BLOCK_NUMBERS / channels).clamp(BLOCK_MIN, BLOCK_MAX);
    let blocks = threads * grid.tiles().div_ceil(threads * most);
    grid.tiles().div_ceil(blocks.max(1)).max(1)
}
