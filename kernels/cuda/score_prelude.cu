// What score.h needs of CUDA. Goes after common.cu or hopper_ptx.cu.

#define NEG_INF __int_as_float(0xff800000)

// A score that overflowed, as the largest number of its sign; NaN stays.
DEV float clamped(float x) {
    float y;
    asm("min.NaN.f32 %0, %1, 0f7f7fffff;" : "=f"(y) : "f"(x));
    asm("max.NaN.f32 %0, %1, 0fff7fffff;" : "=f"(y) : "f"(y));
    return y;
}

#define SCORE_FN DEV
#define SCORE_TANH tanhf
#define SCORE_ABS fabsf
#ifdef HOPPER
// Scores are limited where they overflowed alone, in the run EXACT.
#define SCORE_PRODUCT(a, b) ((a) * (b))
#define SCORE_FINITE(x) (x)
// Fused, whatever product `s` is.
#define SCORE_ADDED(s, a, b) __fmaf_rn(a, b, s)
#else
// Never fused, so that all forms of a kernel agree.
#define SCORE_PRODUCT(a, b) __fmul_rn(a, b)
#define SCORE_FINITE(x) clamped(x)
#define SCORE_ADDED(s, a, b) ((s) + (a) * (b))
#endif
