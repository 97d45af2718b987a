// Element types of K, V and masks, as the parameters code them.
#define TYPE_F32 1
#define TYPE_F16 2
#define TYPE_BF16 3
#define TYPE_BOOL 4

template <int TYPE> DEV float element(const void* base, i64 at) {
    if constexpr (TYPE == TYPE_F32) return ((const float*)base)[at];
    if constexpr (TYPE == TYPE_F16) return f16_to_f32(((const u16*)base)[at]);
    if constexpr (TYPE == TYPE_BF16) return bf16_to_f32(((const u16*)base)[at]);
    if constexpr (TYPE == TYPE_BOOL) return score_if_seen(0.0f, ((const u8*)base)[at]);
    return 0.0f;
}
