// The online softmax over key tiles: a tile's scores become weights, and a finished row its factor and log-sum-exp.

// The state of a thread's two rows. The weight of a score s is exp2(s - ref): the reference `ref` stands in for the
// running maximum of the textbook form, and need only be near it. `l` is the sum of the weights so far.
struct Softmax {
    float ref[2], l[2];
    float alpha[2]; // factor of O before this tile's product is added, if `scaled`
    bool scaled;
};

DEV Softmax softmax_start() {
    return Softmax{{NEG_INF, NEG_INF}, {0.0f, 0.0f}, {1.0f, 1.0f}, false};
}

// Whether the reference is subtracted from huge scores before the multiplication by the scale. The fused form
// s * sc - ref * sc rounds ref * sc by more than huge scores differ. With an additive mask the subtraction comes first
// in every run, since huge finite cells are common; otherwise only in the run EXACT.
#define MASKS_EXACTLY (MASK && MASK != 4 && !SCORE_MOD)

// Turns the scores of one row, in `unit`, into weights; returns the thread's part of their sum.
template <int N>
DEV float to_weights(float (&s)[N / 2], int half, float ref, float sc, float unit, bool masked, bool exact = false) {
    const float off = ref * sc, by = sc * unit;
    // Each row decides for itself, so that its bits do not depend on the rows beside it.
    const bool early = exact || (MASKS_EXACTLY && masked && fabsf(off) > 4096.0f);
    if (MASKS_EXACTLY ? (exact || masked) && __any_sync(~0u, early) : exact) {
        const float a = early ? unit : by, b = early ? ref : off, c = early ? sc : 1.0f;
#pragma unroll
        for (int j = 0; j < N / 8; j++) {
            s[4 * j + 2 * half] = __fmaf_rn(s[4 * j + 2 * half], a, -b) * c;
            s[4 * j + 2 * half + 1] = __fmaf_rn(s[4 * j + 2 * half + 1], a, -b) * c;
        }
    } else {
#pragma unroll
        for (int j = 0; j < N / 8; j++) {
            s[4 * j + 2 * half] = __fmaf_rn(s[4 * j + 2 * half], by, -off);
            s[4 * j + 2 * half + 1] = __fmaf_rn(s[4 * j + 2 * half + 1], by, -off);
        }
    }
    float x = 0.0f, y = 0.0f;
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
        s[4 * j + 2 * half] = exp2_fast(s[4 * j + 2 * half]);
        s[4 * j + 2 * half + 1] = exp2_fast(s[4 * j + 2 * half + 1]);
        x += s[4 * j + 2 * half];
        y += s[4 * j + 2 * half + 1];
    }
    return x + y;
}

// log2 units to units of the reference. With the approximate division ptxas schedules the loops of head dims under 128
// up to 3 % faster and those of 128 up to 1 % slower, and it spills where an f32 mask takes the registers.
#define TO_REFERENCE(by, sc) (D < 128 && MASK != 3 ? __fdividef(by, sc) : (by) / (sc))

// A row is rescaled when one thread's sum of weights in a tile reaches RESCALE_FROM: weights are rounded to f16, which
// overflows above 2^16. A reference above the maximum would leave more headroom, but f16 flushes weights under 2^-25,
// and many small weights add up. From a row's sum of RESCALE_MOST on, the factor would be subnormal: the sum becomes
// infinite instead, and the run EXACT computes the row again.
#define RESCALE_FROM 4096.0f
#define RESCALE_MOST 4.2535296e37f

// Rescales rows whose weights have grown far above 1: the reference rises by log2 of the tile's sum, and weights, sum
// and O shrink by that factor. `part` are the thread's sums of the tile. Each row decides for itself.
template <int N> DEV void rescale_grown_rows(float (&s)[N / 2], Softmax& f, const float (&part)[2], float sc) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float sum = part[half], most = sum;
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
        float factor = 1.0f;
        if (!(sum < RESCALE_MOST)) {
            f.l[half] = sum * __int_as_float(0x7f800000); // infinite, or NaN
        } else if (most >= RESCALE_FROM) {
            const float by = log2_fast(sum);
            f.ref[half] += TO_REFERENCE(by, sc);
            factor = exp2_fast(-by);
        }
        f.l[half] *= factor;
        f.alpha[half] = f.scaled ? f.alpha[half] * factor : factor;
#pragma unroll
        for (int j = 0; j < N / 8; j++) {
            s[4 * j + 2 * half] *= factor;
            s[4 * j + 2 * half + 1] *= factor;
        }
    }
    f.scaled = true;
}

// Turns scores into weights and updates the rows' state. Mostly speculative: the weights are computed against the
// reference as it is, without a maximum over the new scores, and rescaled afterwards where their sum is large. A score
// so far above the reference that its weight overflows (by 2^125) makes the sum infinite, and the row is done again
// in the run EXACT. The maximum is computed first in a row's first tile and while its reference is very low. No row's
// bits depend on the rows beside it.
template <int N>
DEV void softmax(float (&s)[N / 2], Softmax& f, float sc, float unit, bool masked, bool first, int run) {
    f.scaled = false;
    if (run >= UPWARD) {
#pragma unroll
        for (int j = 0; j < N / 2; j++) s[j] = presence(s[j]);
        f.alpha[0] = f.alpha[1] = 1.0f;
        return;
    }
    first = first || !SPECULATE || run == EXACT;
    float part[2]; // sums of the weights that were computed against an older reference
    if (first || __any_sync(~0u, !(f.ref[0] * sc > -16384.0f) || !(f.ref[1] * sc > -16384.0f))) {
        bool some = false;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float a = s[2 * half], b = s[2 * half + 1];
#pragma unroll
            for (int j = 1; j < N / 8; j++) {
                a = fmaxf(a, s[4 * j + 2 * half]);
                b = fmaxf(b, s[4 * j + 2 * half + 1]);
            }
            a = fmaxf(a, b);
            a = fmaxf(a, __shfl_xor_sync(~0u, a, 1));
            a = fmaxf(a, __shfl_xor_sync(~0u, a, 2));
            a *= unit;
            const float old = f.ref[half];
            // The reference moves only where the maximum is more than 8 log2 units above it: below that, weights stay
            // under 2^8, and O need not be rescaled.
            const bool leads = first || !(old * sc > -16384.0f);
            const float now = leads && (a - old) * sc > 8.0f ? a : old;
            f.ref[half] = now;
            // Where no key was visible yet: weights are 0, not 2^(-inf + inf).
            const float ref = now == NEG_INF ? 0.0f : now;
            f.alpha[half] = exp2_fast((old - ref) * sc);
            const float sum = to_weights<N>(s, half, ref, sc, unit, masked, run == EXACT);
            f.l[half] = f.l[half] * f.alpha[half] + sum;
            part[half] = leads ? 0.0f : sum;
            some |= f.alpha[half] != 1.0f;
        }
        f.scaled = __any_sync(~0u, some);
    } else {
        part[0] = to_weights<N>(s, 0, f.ref[0], sc, unit, masked);
        part[1] = to_weights<N>(s, 1, f.ref[1], sc, unit, masked);
        f.l[0] += part[0];
        f.l[1] += part[1];
    }
    if (__any_sync(~0u, !(part[0] + part[1] < RESCALE_FROM))) rescale_grown_rows<N>(s, f, part, sc);
}

// For references above this many powers of two the fused difference is too coarse.
#define FAR_REFERENCE 16384.0f
#define LARGEST 3.4028235e38f

// Finishes two rows: `inv` becomes the factor of O, 1 / sum, and the log-sum-exp is written. `sc` is score_unit().
// `over`: the speculation failed, and the run EXACT is to do the row again; the factor is NaN, so that no stale output
// stays.
DEV void finish(float (&inv)[2], bool (&over)[2], const Softmax& f, const Params& p, float sc, const Tile& t, const Rows& r, int run) {
    inv[0] = inv[1] = 1.0f;
    over[0] = over[1] = false;
    if (run >= UPWARD) return;
    const float infinity = __int_as_float(0x7f800000);
    float* lse = p.lse + (i64)batch_of_rows(p, t) * p.lse_strides[0] + (i64)t.h * p.lse_strides[1] +
                 t.q_start;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float sum = f.l[half];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        // The reference in natural units. clamped() keeps it finite where the conversion of a mask's largest numbers
        // overflows.
        float top = f.ref[half] == NEG_INF ? NEG_INF : clamped(f.ref[half] * natural_unit(p));
        // Whether some tile took the fused difference with a reference for which that is too coarse. With an additive
        // mask only tiles that are free of the mask take the fused form, hence CLASSES. Where scores are modified `sc`
        // is a power of two, and the fused difference is exact until it overflows.
        const bool far = (SCORE_MOD || !MASKS_EXACTLY || CLASSES) && f.ref[half] != NEG_INF &&
                         !(fabsf(f.ref[half] * sc) <= (SCORE_MOD ? LARGEST : FAR_REFERENCE));
        // Every score overflowed to -infinity: the run EXACT holds them at the largest number.
        const bool unseen = !MASK && sum == 0.0f && first_key(p, r, half) <= last_key(p, r, half);
        over[half] = run < EXACT && (sum >= 1.0e38f || f.ref[half] == infinity || far || unseen);
        float part = 1.0f;
        if (p.sinks && sum != 0.0f) {
            const float sink = p.sinks[t.h];
            // Under an additive mask rounded as its cells are, so that equal huge numbers stay equal.
            const float above = MASK && MASK != 4 ? (f.ref[half] - __fmul_rn(sink, cell_unit(p))) * sc
                                                  : (top - sink) * LOG2E;
            part = exp2_fast(fminf(above, 0.0f));
            sum = sum * part + exp2_fast(fminf(-above, 0.0f));
            top = fmaxf(top, sink);
        }
        inv[half] = over[half] ? __int_as_float(0x7fffffff) : sum == 0.0f ? 0.0f : part / sum;
        const int row = r.row + 8 * half;
        if (p.lse && (r.col & 7) == 0 && row < t.sq && (run != EXACT || !is_finite(*output_row(p, t, row))))
            lse[row] = sum == 0.0f ? NEG_INF : top + log2_fast(sum) * LN2;
    }
}
