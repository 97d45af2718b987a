// The softmax over key tiles: weights of a tile's scores, and what a row's sums end as.

// The softmax of a thread's two rows so far. `ref` is what scores are measured against: near the
// maximum, but no more than that. Weights and their sum `l` are relative to it.
struct Soft {
    float ref[2], l[2];
    float alpha[2]; // what O is multiplied by before the next product is added, if `scaled`
    float part[2];  // this tile's sums, if `grown`
    bool scaled, grown;
};

DEV Soft soft_start() {
    return Soft{{NEG_INF, NEG_INF}, {0.0f, 0.0f}, {1.0f, 1.0f}, {0.0f, 0.0f}, false, false};
}

// Whether differences of huge scores are taken before they are multiplied: with an additive mask in
// every run, since masks of huge finite values are common; else in the run EXACT.
#define MASKS_EXACTLY (MASK && MASK != 4 && !SCORE_MOD)

// Scores of one row, in `unit`, to weights; returns the thread's part of their sum.
template <int N>
DEV float weigh(float (&s)[N / 2], int half, float ref, float sc, float unit, bool masked, bool exact = false) {
    const float off = ref * sc, by = sc * unit;
    // The fused product would lose the difference. Each row decides for itself.
    const bool early = exact || (MASKS_EXACTLY && masked && fabsf(off) > 4096.0f);
    if (MASKS_EXACTLY ? (exact || masked) && __any_sync(~0u, early) : exact) {
        const float a = early ? unit : by, b = early ? ref : off, c = early ? sc : 1.0f;
#pragma unroll
        for (int j = 0; j < N / 8; j++) {
            s[4 * j + 2 * half] = __fmaf_rn(s[4 * j + 2 * half], a, -b) * c;
            s[4 * j + 2 * half + 1] = __fmaf_rn(s[4 * j + 2 * half + 1], a, -b) * c;
        }
    } else
    {
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

// Scores above `ref` give weights above 1, in f16 up to its largest number. A tile whose weights sum up
// to more than this is done again. A reference above the maximum would leave more room, but f16 flushes
// weights under 2^-25, which many keys together make up for.
#define POISON (F16 ? 65504.0f : 1.8446744e19f)

// Scores to weights. Usually without a look at their maximum: they are taken against the reference
// that there is, and where their sum then shows that they have grown much, the reference follows
// for the tiles to come. Weights too large for that (a leap by 2^64, in f16 by 2^16) make the sum
// infinite; such rows are done again in the run EXACT. The maximum comes first in a row's first tile
// and while its reference is very low. No row's bits depend on the rows beside it.
template <int N>
DEV void softmax(float (&s)[N / 2], Soft& f, float sc, float unit, bool masked, bool first, int run) {
    if (run >= UPWARD) {
#pragma unroll
        for (int j = 0; j < N / 2; j++) s[j] = presence(s[j]);
        f.alpha[0] = f.alpha[1] = 1.0f;
        f.scaled = f.grown = false;
        return;
    }
    first = first || !SPECULATE || run == EXACT;
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
            // O is not rescaled for less than 2^8.
            const bool leads = first || !(old * sc > -16384.0f);
            const float now = leads && (a - old) * sc > 8.0f ? a : old;
            f.ref[half] = now;
            // Where no key was visible yet: weights are 0, not 2^(-inf + inf).
            const float ref = now == NEG_INF ? 0.0f : now;
            const float shrunk = exp2_fast((old - ref) * sc);
            f.alpha[half] = (f.scaled ? f.alpha[half] : 1.0f) * shrunk;
            const float sum = weigh<N>(s, half, ref, sc, unit, masked, run == EXACT);
            f.l[half] = f.l[half] * shrunk + sum;
            f.part[half] = leads ? 0.0f : sum;
            some |= f.alpha[half] != 1.0f;
        }
        f.scaled = __any_sync(~0u, some);
        f.grown = __any_sync(~0u, !(f.part[0] + f.part[1] < 4096.0f));
        return;
    }
    f.part[0] = weigh<N>(s, 0, f.ref[0], sc, unit, masked);
    f.part[1] = weigh<N>(s, 1, f.ref[1], sc, unit, masked);
    f.l[0] += f.part[0];
    f.l[1] += f.part[1];
    f.grown = __any_sync(~0u, !(f.part[0] + f.part[1] < 4096.0f));
}

// In units of the reference. Around the approximate division ptxas schedules the loop of head dim 64
// without bounds and masks 1.3 % faster, and others slower.
#define GROWTH(by, sc) (D == 64 && !RIGHT && !MASK ? __fdividef(by, sc) : (by) / (sc))

// After O took this tile's factor: where weights have grown much, the reference follows, and O and
// the sum shrink by as much.
DEV void settle(Soft& f, float sc) {
    f.scaled = f.grown;
    if (!f.grown) return;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float sum = f.part[half], most = sum;
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
        f.alpha[half] = 1.0f;
        if (!(sum < POISON)) {
            f.l[half] = sum * __int_as_float(0x7f800000); // infinite, or NaN
        } else if (most >= 4096.0f) { // enough to set `grown` by itself
            const float by = log2_fast(sum);
            f.ref[half] += GROWTH(by, sc);
            f.alpha[half] = exp2_fast(-by);
            f.l[half] *= f.alpha[half];
        }
    }
}

// Above this many powers of two a fused difference is too coarse.
#define FAR_REFERENCE 16384.0f
#define LARGEST 3.4028235e38f

// Whether a row sees a key, by its bounds.
DEV bool sees_keys(const Params& p, const Rows& r, int half) {
    int first = 0, last = r.sk - 1;
#if RIGHT
    last = min(last, r.pos + 8 * half + p.right);
#endif
#if LEFT
    first = max(first, r.pos + 8 * half - p.left);
#endif
    return first <= last;
}

// What O is multiplied by in the end, for scores of `sc` a unit; writes the rows' log-sum-exp. `over`: the speculation failed, and
// the run EXACT is to do the row again, which finds NaN in all of it then.
DEV void finish(float (&inv)[2], bool (&over)[2], const Soft& f, const Params& p, float sc, const Tile& t, const Rows& r, int run) {
    inv[0] = inv[1] = 1.0f;
    over[0] = over[1] = false;
    if (run >= UPWARD) return;
    const float infinity = __int_as_float(0x7f800000);
    float* lse = p.lse + (i64)(VARLEN ? 0 : t.b) * p.lse_strides[0] + (i64)t.h * p.lse_strides[1] +
                 t.q_start;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float sum = f.l[half];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        // In natural units, that of a mask's largest numbers is finite.
        float top = f.ref[half] == NEG_INF ? NEG_INF : clamped(f.ref[half] * natural_unit(p));
        // With an additive mask all but the tiles that are free of it take differences first. Where scores
        // are modified `sc` is a power of two, and the fused difference is exact until it overflows.
        const bool far = (SCORE_MOD || !MASKS_EXACTLY || CLASSES) && f.ref[half] != NEG_INF &&
                         !(fabsf(f.ref[half] * sc) <= (SCORE_MOD ? LARGEST : FAR_REFERENCE));
        // Every score overflowed to -infinity: the run EXACT holds them at the largest number.
        const bool unseen = !MASK && sum == 0.0f && sees_keys(p, r, half);
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
