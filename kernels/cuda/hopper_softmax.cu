// The softmax over key tiles: weights of a tile's scores, and what a row's sums end as.

// The softmax of a thread's two rows so far. `ref` is what scores are measured against: near the
// maximum, but no more than that. Weights and their sum `l` are relative to it.
struct Soft {
    float ref[2], l[2];
    float alpha[2]; // what O is multiplied by before this tile's product is added, if `scaled`
    bool scaled;
};

DEV Soft soft_start() {
    return Soft{{NEG_INF, NEG_INF}, {0.0f, 0.0f}, {1.0f, 1.0f}, false};
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

// In units of the reference. Around the approximate division ptxas schedules the loops of head dims under 128
// up to 3 % faster and those of 128 up to 1 % slower, and it spills where an f32 mask takes the registers.
#define GROWTH(by, sc) (D < 128 && MASK != 3 ? __fdividef(by, sc) : (by) / (sc))

// From this weight of a thread on, a row's weights are measured anew, against their sum: f16 holds no
// more than 2^16. A reference above the maximum would leave more room, but f16 flushes weights under 2^-25,
// which many keys together make up for. From LEAPT on, the factor would be subnormal.
#define GROWN 4096.0f
#define LEAPT 4.2535296e37f

// Measures a tile's weights anew in rows where they have grown much: the reference follows, and weights, the
// sum and O shrink by as much. `part` are the thread's sums of the tile. Each row decides for itself.
template <int N> DEV void follow(float (&s)[N / 2], Soft& f, const float (&part)[2], float sc) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float sum = part[half], most = sum;
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
        float factor = 1.0f;
        if (!(sum < LEAPT)) {
            f.l[half] = sum * __int_as_float(0x7f800000); // infinite, or NaN
        } else if (most >= GROWN) {
            const float by = log2_fast(sum);
            f.ref[half] += GROWTH(by, sc);
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

// Scores to weights. Usually without a look at their maximum: they are taken against the reference
// that there is, and where their sum then shows that they have grown much, they are measured anew. Weights too
// large for that (a leap by 2^125) poison the sum, and such rows are done again in the run EXACT. The
// maximum comes first in a row's first tile and while its reference is very low. No row's bits depend on the
// rows beside it.
template <int N>
DEV void softmax(float (&s)[N / 2], Soft& f, float sc, float unit, bool masked, bool first, int run) {
    f.scaled = false;
    if (run >= UPWARD) {
#pragma unroll
        for (int j = 0; j < N / 2; j++) s[j] = presence(s[j]);
        f.alpha[0] = f.alpha[1] = 1.0f;
        return;
    }
    first = first || !SPECULATE || run == EXACT;
    float part[2]; // what weights against an older reference sum up to
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
            f.alpha[half] = exp2_fast((old - ref) * sc);
            const float sum = weigh<N>(s, half, ref, sc, unit, masked, run == EXACT);
            f.l[half] = f.l[half] * f.alpha[half] + sum;
            part[half] = leads ? 0.0f : sum;
            some |= f.alpha[half] != 1.0f;
        }
        f.scaled = __any_sync(~0u, some);
    } else {
        part[0] = weigh<N>(s, 0, f.ref[0], sc, unit, masked);
        part[1] = weigh<N>(s, 1, f.ref[1], sc, unit, masked);
        f.l[0] += part[0];
        f.l[1] += part[1];
    }
    if (__any_sync(~0u, !(part[0] + part[1] < GROWN))) follow<N>(s, f, part, sc);
}

// Above this many powers of two a fused difference is too coarse.
#define FAR_REFERENCE 16384.0f
#define LARGEST 3.4028235e38f

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
