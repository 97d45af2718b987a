//! The same problem over another count of keys.

use super::builder::check_no_offset;
use super::keys::{KeyLengths, Keys};
use super::placement::{Placement, mask_elements};
use super::problem::Problem;
use crate::error::{MlxError, Result};

impl Problem {
    /// The same problem over `key_len` keys: a cache that was filled further, say. Strides stay, so rows
    /// lie where they lay; a query offset of [`BottomRight`](super::QueryOffset::BottomRight) follows the
    /// length, a fixed one does not.
    ///
    /// # Errors
    /// `InvalidArgument` where
    /// - `key_len` is 0, or more than [`ProblemBuilder::key_capacity`](super::ProblemBuilder::key_capacity)
    ///   or a sequence's entries in the block table (without a capacity or with a mask: more than the
    ///   problem was built with);
    /// - each sequence has a length of its own: packed keys, and [`KeyLengths`] other than all of them;
    /// - there are tile classes, whose grid depends on the count of keys;
    /// - positions matter, qL and `key_len` differ, and no query offset was stated.
    pub fn with_key_len(&self, key_len: usize) -> Result<Self> {
        let refused = |expected: &str, got| Err(MlxError::expected("key_len", expected, got));
        if matches!(self.keys, Keys::Packed(_)) {
            return refused("keys that are not packed", "cu_seqlens");
        }
        if self.key_lengths != KeyLengths::All {
            return refused("sequences of one length", "key_lengths");
        }
        if self.tile_classes {
            return refused("a problem without tile classes", "tile classes");
        }
        let most = self.most_keys;
        if most == 0 {
            return refused("a problem that was built with keys", "one without");
        }
        if !(1..=most).contains(&key_len) {
            let expected = format!("1 to {most} keys, which the operands have room for");
            return Err(MlxError::expected("key_len", expected, key_len));
        }
        let mut changed = self.clone();
        changed.shape.key_len = key_len;
        if !self.offset_stated {
            check_no_offset(&changed)?;
        }
        Placement::of(self).keys(&mut changed)?;
        if let Some(mask) = &self.score.mask {
            changed.elements.mask = mask_elements(mask, &changed)?;
        }
        Ok(changed)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Layout, MaskSpec, Pages, ProblemBuilder, QueryOffset, Role, Shape};
    use super::*;
    use crate::dtype::DType;

    fn built(key_len: usize, with: impl Fn(ProblemBuilder) -> ProblemBuilder) -> Problem {
        let shape = Shape {
            batch: 2,
            heads: 4,
            kv_heads: 2,
            query_len: 3,
            key_len,
            qk_dim: 64,
            v_dim: 64,
        };
        with(Problem::builder(DType::BF16, shape)).build().unwrap()
    }

    #[test]
    fn another_length_gives_what_the_builder_would() {
        let forms: [fn(ProblemBuilder) -> ProblemBuilder; 3] = [
            |b| b,
            |b| b.layout(Layout::SeqMajor),
            |b| b.causal(true).window(4).lse(true),
        ];
        for form in forms {
            let form = |b| {
                form(b)
                    .key_capacity(20)
                    .query_offset(QueryOffset::BottomRight)
            };
            for len in [1, 2, 7, 19, 20] {
                assert_eq!(built(5, form).with_key_len(len).unwrap(), built(len, form));
            }
        }
        // And back, with a mask of 5 columns.
        let form = |b: ProblemBuilder| b.mask(MaskSpec::broadcast(DType::F32, [1, 1, 3, 5]));
        let short = built(5, form).with_key_len(2).unwrap();
        assert_eq!(short.operand(Role::Mask).unwrap().elements, 12);
        assert_eq!(short.with_key_len(5).unwrap(), built(5, form));
    }

    #[test]
    fn pages_have_room_for_what_a_block_table_names() {
        let pages = |b: ProblemBuilder| {
            b.pages(Pages {
                count: 9,
                page_size: 4,
                per_sequence: 3,
            })
        };
        for len in [1, 4, 12] {
            assert_eq!(
                built(5, pages).with_key_len(len).unwrap(),
                built(len, pages)
            );
        }
        refused(&built(5, pages), 13, &["1 to 12", "got 13"]);
    }

    #[track_caller]
    fn refused(problem: &Problem, len: usize, words: &[&str]) {
        let error = problem.with_key_len(len).unwrap_err().to_string();
        for word in words {
            assert!(error.contains(word), "`{word}` is not in: {error}");
        }
    }

    #[test]
    fn lengths_that_operands_have_no_room_for_are_refused() {
        refused(&built(5, |b| b), 6, &["key_len", "1 to 5", "got 6"]);
        refused(&built(5, |b| b), 0, &["key_len", "1 to 5", "got 0"]);
        refused(&built(5, |b| b.key_capacity(9)), 10, &["1 to 9", "got 10"]);
        // A mask has columns for 5 keys, whatever K and V have room for.
        let masked = |b: ProblemBuilder| {
            let mask = MaskSpec::broadcast(DType::F32, [1, 1, 3, 5]);
            b.key_capacity(9).mask(mask)
        };
        refused(&built(5, masked), 6, &["1 to 5"]);
    }

    #[test]
    fn what_no_single_length_describes_is_refused() {
        let packed = Problem::varlen(DType::BF16, 2, 2, 64, &[0, 3], &[0, 5]);
        refused(&packed.build().unwrap(), 4, &["packed", "cu_seqlens"]);
        let each = |b: ProblemBuilder| b.key_lengths(KeyLengths::Host([2, 5].into()));
        refused(&built(5, each), 4, &["one length", "key_lengths"]);
        let classes = |b: ProblemBuilder| {
            b.mask(MaskSpec::broadcast(DType::BF16, [1, 1, 3, 5]))
                .tile_classes(true)
        };
        refused(&built(5, classes), 4, &["tile classes"]);
        let none = built(0, |b| b.key_capacity(9)).without_keys().unwrap();
        refused(&none, 1, &["built with keys"]);
        // Three queries over three keys need no offset, over four they do.
        let causal = built(3, |b| b.causal(true).key_capacity(9));
        refused(&causal, 4, &["query_offset", "3 queries over 4 keys"]);
    }
}
