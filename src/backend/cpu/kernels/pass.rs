//! Some rows of a unit on their way through some of its strips, by one thread.

use std::ops::Range;

use super::bound_call::BoundCall;
use super::call::Unit;
use super::careful::Careful;
use super::packed::Packed;
use super::scratch::Scratch;
use super::tile::Tile;

/// Some rows of a unit on their way through some of its strips.
#[derive(Debug)]
pub(super) struct Pass<'a> {
    pub(super) call: &'a BoundCall<'a>,
    pub(super) unit: &'a Unit,
    pub(super) rows: Range<usize>,
    pub(super) strips: Range<usize>,
    /// The strip with which the rows are written out.
    pub(super) last: Option<usize>,
    /// What this thread will pass after it.
    pub(super) next: Option<&'a Unit>,
    /// Whether keys whose V is not finite may be among them.
    pub(super) careful: bool,
}

impl Pass<'_> {
    /// Takes the rows over the strips, packing these on the way unless there are too few rows to pay
    /// for it; `end` gets what came of it.
    pub(super) fn run<R>(
        &self,
        scratch: &mut Scratch,
        end: impl FnOnce(&mut Tile<'_>, &mut Careful) -> R,
    ) -> R {
        let (call, unit) = (self.call, self.unit);
        let Scratch {
            tile,
            keys,
            values,
            careful,
        } = scratch;
        let mut tile = Tile::new(call, unit, self.rows.clone(), self.last, tile);
        if self.careful {
            careful.begin(call, tile.rows.len());
        }
        let in_place = unit.in_place(call);
        let units = if in_place { 0 } else { call.strip_units() };
        let (k, v) = (keys.reserve(units), values.reserve(units));
        let next = self
            .next
            .map(|unit| unit.strip_rows(call, unit.strips.start));
        // SAFETY: the job's promises hold, the kernels suit this machine, and the buffers have room
        // for a strip.
        unsafe {
            (call.kernels.begin)(&mut tile);
            for strip in self.strips.clone() {
                let mut rows = unit.strip_rows(call, strip);
                if self.careful {
                    rows.v = careful.clean(call, unit, strip);
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
                            Some(unit.strip_rows(call, strip + 1))
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
