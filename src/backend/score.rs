//! The rule of a score as the kernels of every GPU read it.

/// Goes after a language's prelude and before the kernels.
pub(crate) const SCORE_TEXT: &str = include_str!("../../kernels/score.h");

#[cfg(test)]
mod tests {
    use super::SCORE_TEXT;
    use crate::attention::class_tile;

    #[test]
    fn kernels_have_the_hosts_class_tiles() {
        let (narrow, wide) = (class_tile(256), class_tile(512));
        for (side, wide, narrow) in [("ROWS", wide.bq, narrow.bq), ("KEYS", wide.bk, narrow.bk)] {
            let line = format!("#define CLASS_{side}_AT(D) ((D) >= 512 ? {wide} : {narrow})\n");
            assert!(SCORE_TEXT.contains(&line), "{line}");
        }
    }
}
