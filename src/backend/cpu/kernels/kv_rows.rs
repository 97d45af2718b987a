//! Where the rows of K and V lie: the one place where a key becomes an address. Kernels ask for runs of
//! rows that lie one stride apart, and make no assumption about what follows a run.

use std::ops::Range;

/// K and V of the keys of a strip.
#[derive(Debug, Clone, Copy)]
pub(super) struct StripRows {
    pub(super) k: KvRows,
    pub(super) v: KvRows,
}

/// Rows of K, or of V, one for each of some keys.
#[derive(Debug, Clone, Copy)]
pub(super) struct KvRows {
    /// The first row, or, of pages, the row in the first slot of the first page.
    first: *const u8,
    /// Bytes from one row to the next.
    stride: usize,
    count: usize,
    pages: Option<InPages>,
    #[cfg(test)]
    breaks: Option<Breaks>,
}

/// The pages of a sequence: each entry names one, and there is an entry for each key.
#[derive(Debug, Clone, Copy)]
pub(super) struct Table {
    entries: *const i32,
    /// Keys of a page are two to this power.
    log2_size: u32,
}

/// Rows in pages.
#[derive(Debug, Clone, Copy)]
struct InPages {
    table: Table,
    /// Bytes from one page to the next.
    stride: usize,
    /// Keys of the sequence before the first row.
    skipped: usize,
}

/// Rows that lie one stride apart.
#[derive(Debug, Clone, Copy)]
pub(super) struct Run {
    first: *const u8,
    stride: usize,
    count: usize,
}

impl KvRows {
    /// `count` rows that lie `stride` bytes apart.
    pub(super) fn strided(first: *const u8, stride: usize, count: usize) -> Self {
        Self {
            first,
            stride,
            count,
            pages: None,
            #[cfg(test)]
            breaks: None,
        }
    }

    /// The same rows in the pages of a table, which lie `stride` bytes apart; each has its first row where that of page 0
    /// is the first row.
    pub(super) fn in_pages(self, table: Table, stride: usize) -> Self {
        let pages = Some(InPages {
            table,
            stride,
            skipped: 0,
        });
        Self { pages, ..self }
    }

    /// The rows of `keys`, counted from 0 again.
    pub(super) fn of(self, keys: Range<usize>) -> Self {
        debug_assert!(keys.start <= keys.end && keys.end <= self.count);
        Self {
            first: match self.pages {
                None => self.address(keys.start),
                Some(_) => self.first,
            },
            count: keys.len(),
            pages: self.pages.map(|pages| InPages {
                skipped: pages.skipped + keys.start,
                ..pages
            }),
            #[cfg(test)]
            breaks: self.breaks.map(|b| b.after(keys.start)),
            ..self
        }
    }

    /// How many rows there are.
    #[inline(always)]
    pub(super) fn len(self) -> usize {
        self.count
    }

    /// The rows from that of `key` up to the next break: at least one, at most to the last row.
    #[inline(always)]
    pub(super) fn run(self, key: usize) -> Run {
        let count = self.count.saturating_sub(key);
        let count = self.pages.map_or(count, |p| count.min(p.left_at(key)));
        #[cfg(test)]
        let count = self.breaks.map_or(count, |b| count.min(b.left_at(key)));
        Run {
            first: self.address(key),
            stride: self.stride,
            count,
        }
    }

    /// The rows of `count` keys from `key` on, where all of them are there and one stride apart.
    #[inline(always)]
    pub(super) fn run_of(self, key: usize, count: usize) -> Option<Run> {
        if key + count > self.count {
            return None;
        }
        let run = self.run(key);
        (run.count >= count).then_some(run)
    }

    /// The row of one key.
    #[inline(always)]
    pub(super) fn row<T>(self, key: usize) -> *const T {
        self.run(key).row(0)
    }

    /// The row of one key, null past the last row.
    #[inline(always)]
    pub(super) fn row_or_null<T>(self, key: usize) -> *const T {
        if key < self.count {
            self.row(key)
        } else {
            std::ptr::null()
        }
    }

    /// An address to prefetch for the row of `key`, which may lie past the last row.
    #[inline(always)]
    pub(super) fn prefetch_address(self, key: usize) -> *const u8 {
        self.address(key)
    }

    #[inline(always)]
    fn address(self, key: usize) -> *const u8 {
        let offset = match self.pages {
            None => key.wrapping_mul(self.stride),
            Some(pages) if key < self.count => pages.offset(key, self.stride),
            // There may be no page for a key past the last.
            Some(_) => 0,
        };
        #[cfg(test)]
        let offset = offset + self.breaks.map_or(0, |b| b.bytes_before(key));
        self.first.wrapping_add(offset)
    }
}

impl Table {
    /// `page_size` is a power of two.
    pub(super) fn new(entries: *const i32, page_size: usize) -> Self {
        Self {
            entries,
            log2_size: page_size.trailing_zeros(),
        }
    }
}

impl InPages {
    /// Rows from that of `key` to the end of its page.
    #[inline(always)]
    fn left_at(self, key: usize) -> usize {
        let size = 1usize << self.table.log2_size;
        size - (self.skipped + key) % size
    }

    /// Bytes from the first row of page 0 to the row of a key that is there.
    #[inline(always)]
    fn offset(self, key: usize, stride: usize) -> usize {
        let (key, size) = (self.skipped + key, 1usize << self.table.log2_size);
        // SAFETY: the table has an entry for each key.
        let page = unsafe { *self.table.entries.add(key >> self.table.log2_size) };
        let in_page = (key % size).wrapping_mul(stride);
        (page as usize)
            .wrapping_mul(self.stride)
            .wrapping_add(in_page)
    }
}

impl Run {
    /// How many rows there are.
    #[inline(always)]
    pub(super) fn len(self) -> usize {
        self.count
    }

    /// Row `i` of the run. Past the last one this is an address to prefetch at most.
    #[inline(always)]
    pub(super) fn row<T>(self, i: usize) -> *const T {
        self.first.wrapping_add(i.wrapping_mul(self.stride)).cast()
    }
}

/// Breaks between runs, for tests: after every so many rows, bytes that belong to no row.
#[cfg(test)]
#[derive(Debug, Clone, Copy)]
pub(super) struct Breaks {
    pub(super) every: usize,
    pub(super) bytes: usize,
    /// Rows of the first run that lie before the first row.
    pub(super) skipped: usize,
}

#[cfg(test)]
impl KvRows {
    pub(super) fn with_breaks(self, breaks: Option<Breaks>) -> Self {
        Self { breaks, ..self }
    }
}

#[cfg(test)]
impl Breaks {
    fn after(self, rows: usize) -> Self {
        let skipped = (self.skipped + rows) % self.every;
        Self { skipped, ..self }
    }

    fn left_at(self, row: usize) -> usize {
        self.every - (self.skipped + row) % self.every
    }

    pub(super) fn bytes_before(self, row: usize) -> usize {
        (self.skipped + row) / self.every * self.bytes
    }
}
