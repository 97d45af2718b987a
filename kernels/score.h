// The rule of a score: what happens to it and which keys a row sees. One text for MSL and CUDA. Before it, a
// language's prelude (metal/common.metal, cuda/score_prelude.cu) defines
//   SCORE_FN              the qualifiers of an inline device function
//   SCORE_PRODUCT(a, b)   a b
//   SCORE_ADDED(s, a, b)  s + a b
//   SCORE_FINITE(x)       x, limited to the finite numbers where the kernels need that
//   SCORE_TANH, SCORE_ABS, NEG_INF
//
// The steps, in this order, for a query row at position p (its index plus the offset) and key j:
//   1. scale       s = scale <q, k>                             score_scaled
//   2. softcap     s = c tanh(s / c)                            score_softcapped
//   3. bias        s = s + mask cell; s = s - slope |p - j|     score_masked, score_alibi
//   4. visibility  -infinity where the row does not see j       score_if_seen
// Then the softmax. Of the two biases of step 3, a kernel may add either first: only rounding differs.
//
// Scores are in natural-log units by the rule. A kernel may keep them in another unit, one natural unit
// being the constant `unit` in it; then the constants of steps 1 to 3 carry that factor. Steps that the Hopper
// kernels take in another form are listed, with the reason, in cuda/hopper_scores.cu.

#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f

// ---- values ---------------------------------------------------------------------------------

SCORE_FN float score_scaled(float product, float scale) { return SCORE_FINITE(SCORE_PRODUCT(product, scale)); }

// `over_cap` is s / c: a division here, or a factor of the scale.
SCORE_FN float score_softcapped(float over_cap, float cap) { return cap * SCORE_TANH(over_cap); }

// Positions are of 64 bits where an offset may pass 2^31.
template <typename I> SCORE_FN float score_distance(I position, I key) { return SCORE_ABS(float(position - key)); }
SCORE_FN float score_alibi(float s, float slope, float distance) { return s - slope * distance; }

// A cell of an additive mask hides its key, or is added.
SCORE_FN bool score_cell_hides(float cell) { return cell == NEG_INF; }
SCORE_FN float score_masked(float s, float cell, float unit) { return SCORE_ADDED(s, unit, cell); }

// Selected, not added: NaN plus -infinity is NaN, and a hidden key adds nothing whatever its score.
// A macro, so that the score of a hidden key need not be computed.
#define score_if_seen(s, seen) ((seen) ? (s) : NEG_INF)

// ---- visibility -----------------------------------------------------------------------------

// A row at position p sees the keys from p - left to p + right of those that there are. A window of w keys, the
// row's own included, is left = w - 1; a causal row has right = 0. Either may be beyond the keys.
template <typename I, typename W> SCORE_FN I score_first_key(I position, W left) { return position - left; }
template <typename I, typename W> SCORE_FN I score_last_key(I position, W right) { return position + right; }

// `key`, kept to [0, keys].
template <typename I> SCORE_FN int score_key_within(I key, int keys) { return key < 0 ? 0 : key > keys ? keys : int(key); }

// The same as a range of the keys that there are: the first, and one past the last.
template <typename I> SCORE_FN int score_first_seen(I position, int left, int keys) {
    return score_key_within(score_first_key(position, left), keys);
}
template <typename I> SCORE_FN int score_end_seen(I position, int right, int keys) {
    return score_key_within(score_last_key(position, right) + 1, keys);
}

// The same for one key, as masks are filled: `window` in keys, 0 for none.
template <typename I> SCORE_FN bool score_bounds_show(I position, I key, bool causal, I window) {
    return (!causal || key <= score_last_key(position, 0)) &&
           (window == 0 || key >= score_first_key(position, window - 1));
}

// ---- classes of the tiles of a mask ---------------------------------------------------------

// Query rows and keys of one class tile at head dim D.
#define CLASS_ROWS_AT(D) ((D) >= 512 ? 8 : 32)
#define CLASS_KEYS_AT(D) ((D) >= 512 ? 64 : 16)

#define CLASS_SKIP 0  // every cell is at or below MASKED_AT_OR_BELOW: the tile is left out
#define CLASS_MIXED 1 // the mask is read
#define CLASS_FREE 2  // every cell is 0: the mask is left out

// A tile is skipped where no cell is above this.
#define MASKED_AT_OR_BELOW -1.0e30f
