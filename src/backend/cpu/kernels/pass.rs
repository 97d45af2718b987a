//! Some rows of a head task on their way through some of its strips, by one thread.

use std::ops::Range;

use super::bound_call::BoundCall;
use super::call::HeadTask;
use super::careful::Careful;
use super::packed::Packed;
use super::scratch::Scratch;
use super::tile::Tile;

/// Some rows of a head task on their way through some of its strips.
#[derive(Debug)]
pub(super) struct Pass<'a> {
    pub(super) call: &'a BoundCall<'a>,
    pub(super) task: &'a HeadTask,
    pub(super) rows: Range<usize>,
    pub(super) strips: Range<usize>,
    /// The strip with which the rows are written out.
    pub(super) last: Option<usize>,
    /// The head task that this thread takes next: its first strip is prefetched.
    pub(super) next: Option<&'a HeadTask>,
    /// Whether V may hold elements that are not finite.
    pub(super) careful: bool,
}

impl Pass<'_> {
    /// Takes the rows over the strips, packing each strip first unless there are too few rows to pay for
    /// it, and hands the finished tile to `end`.
    pub(super) fn run<R>(
        &self,
        scratch: &mut Scratch,
        end: impl FnOnce(&mut Tile<'_>, &mut Careful) -> R,
    ) -> R {
        let (call, task) = (self.call, self.task);
        let Scratch {
            tile,
            keys,
            values,
            careful,
        } = scratch;
        let mut tile = Tile::new(call, task, self.rows.clone(), self.last, tile);
        if self.careful {
            careful.begin(call, tile.rows.len());
        }
        let in_place = task.in_place(call);
        let words = if in_place { 0 } else { call.strip_words() };
        let (k, v) = (keys.reserve(words), values.reserve(words));
        let next = self
            .next
            .map(|task| task.strip_rows(call, task.strips.start));
        // SAFETY: the job's promises hold, the kernels suit this machine, and the buffers have room
        // for a strip.
        unsafe {
            (call.kernels.begin)(&mut tile);
            for strip in self.strips.clone() {
                let mut rows = task.strip_rows(call, strip);
                if self.careful {
                    rows.v = careful.clean(call, task, strip);
                }
                if in_place {
                    (call.kernels.step_in_place)(&mut tile, strip, rows);
                } else {
                    (call.kernels.pack)(call, rows, k, v);
                    let packed = Packed {
                        strip,
                        k,
                        v,
                        next: if strip + 1 < self.strips.end {
                            Some(task.strip_rows(call, strip + 1))
                        } else {
                            next
                        },
                    };
                    (call.kernels.step)(&mut tile, packed);
                }
                if self.careful {
                    careful.note(&tile);
                }
            }
        }
        end(&mut tile, careful)
    }
}
