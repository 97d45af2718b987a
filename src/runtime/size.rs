//! Grids and threadgroups.

/// Sizes along x, y and z.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MTLSize {
    /// Along x.
    pub width: u64,
    /// Along y.
    pub height: u64,
    /// Along z.
    pub depth: u64,
}

impl MTLSize {
    /// Sizes along x, y and z.
    pub const fn new(width: u64, height: u64, depth: u64) -> Self {
        Self {
            width,
            height,
            depth,
        }
    }

    pub(crate) const fn to_array(self) -> [u64; 3] {
        [self.width, self.height, self.depth]
    }
}

impl From<[u64; 3]> for MTLSize {
    fn from([width, height, depth]: [u64; 3]) -> Self {
        Self {
            width,
            height,
            depth,
        }
    }
}
