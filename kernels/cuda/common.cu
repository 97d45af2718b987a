// What every CUDA kernel of this crate starts with. No header is included: the runtime compiler
// needs none.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
typedef unsigned int uint;
typedef long long int64_t;

#define DEV static __device__ __forceinline__
#define DEV_MEMBER __device__ __forceinline__
#define ALL_LANES 0xffffffffu

DEV float bf16_to_f32(u16 bits) { return __uint_as_float(u32(bits) << 16); }

DEV float f16_to_f32(u16 bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}

DEV u16 f32_to_bf16(float x) {
    u16 bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

DEV u16 f32_to_f16(float x) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

// The same number, but the compiler does not know: what is computed from it is computed anew there, and not kept in
// registers from where it was computed before.
DEV u32 opaque(u32 x) {
    asm volatile("" : "+r"(x));
    return x;
}

DEV u32 shared_address(const void* at) { return u32(__cvta_generic_to_shared(at)); }

// Copies 16 bytes, or zeros where there is nothing to copy.
DEV void copy16(u32 to, const void* from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}

DEV void copy4(u32 to, const void* from, bool there) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(there ? 4 : 0) : "memory");
}

DEV void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N of the groups committed last are under way.
template <int N> DEV void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// Waits until the kernel before has ended and what it wrote can be read, and lets the one after start,
// which waits likewise. Without programmatic dependent launches neither does anything.
DEV void wait_for_kernel_before() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
