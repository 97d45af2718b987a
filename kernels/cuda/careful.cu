// Runs of a threadblock over its query tiles where K or V holds NaN or infinities. Goes after score.h.
//
// A hidden key has weight 0, but 0 times NaN or infinity is NaN in P V. So the run PLAIN tests its finished rows, and
// where one is not finite the threadblock does its tiles again: same tiles, same order, same instructions, but `cleaned`
// replaces the elements of V that are not finite before the product. A row that sees none of them so gets the bits that
// it has whatever those elements are. Two more runs find the elements of O whose row does see one: they multiply ones
// for visible keys with ones for such elements, and where the count is positive, O is an infinity or NaN.

enum Run {
    PLAIN,
    CLEAN,    // elements of V that are not finite are 0; hidden scores are selected away
    EXACT,    // as CLEAN, but every maximum is computed first: rows whose speculative softmax overflowed (Hopper)
    UPWARD,   // counts of +infinity and NaN that a row sees
    DOWNWARD, // counts of -infinity and NaN that a row sees
    DONE,
};

// A bool at compile time, as an argument's type.
template <bool B>
struct Is {
    DEV_MEMBER constexpr operator bool() const { return B; }
};
typedef Is<true> Yes;
typedef Is<false> No;

template <bool F16_BITS> DEV u32 cleaned_element(u32 x, int run) {
    const u32 infinity = F16_BITS ? 0x7c00 : 0x7f80, one = F16_BITS ? 0x3c00 : 0x3f80;
    const u32 magnitude = x & 0x7fff;
    if (run <= EXACT) return magnitude >= infinity ? 0 : x;
    const u32 counted = run == UPWARD ? infinity : 0x8000 | infinity;
    return magnitude > infinity || x == counted ? one : 0;
}

// Two 16-bit elements of V as `run` multiplies them.
template <bool F16_BITS> DEV u32 cleaned(u32 pair, int run) {
    return cleaned_element<F16_BITS>(pair & 0xffff, run) | cleaned_element<F16_BITS>(pair >> 16, run) << 16;
}

// The same for one element in f32.
DEV float cleaned(float x, int run) {
    const u32 bits = __float_as_uint(x), magnitude = bits & 0x7fffffff, infinity = 0x7f800000;
    if (run <= EXACT) return magnitude >= infinity ? 0.0f : x;
    const u32 counted = run == UPWARD ? infinity : 0x80000000 | infinity;
    return magnitude > infinity || bits == counted ? 1.0f : 0.0f;
}

// Cleans `bytes` bytes of 16-bit elements in shared memory, in place, by `threads` threads. Gives whether this thread
// changed any.
template <bool F16_BITS> DEV bool clean_halves(void* at, int bytes, int thread, int threads, int run) {
    u32 changed = 0;
#pragma unroll 1
    for (int i = thread; i < bytes / 8; i += threads) {
        uint2* to = (uint2*)at + i;
        const uint2 x = *to, y = make_uint2(cleaned<F16_BITS>(x.x, run), cleaned<F16_BITS>(x.y, run));
        *to = y;
        changed |= (x.x ^ y.x) | (x.y ^ y.y);
    }
    return changed != 0;
}

// An element of O whose row sees `count` of the elements that `run` counts; `was` is its value after the runs before.
DEV float counted(float was, float count, int run) {
    if (!(count > 0.0f)) return was;
    const float infinity = __int_as_float(0x7f800000), nan = __int_as_float(0x7fffffff);
    if (run == UPWARD) return was != was ? was : infinity;
    return was != was || was == infinity ? nan : -infinity;
}

// The weight of a key in the runs that count: 1 if visible, 0 if hidden.
DEV float presence(float score) { return score == NEG_INF ? 0.0f : 1.0f; }
