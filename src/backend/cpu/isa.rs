//! Which instruction set the CPU kernels use: the best of this machine, or the one forced by
//! `MLX_FLASH_CPU_ISA`.

use std::fmt;

/// What the processor says of itself.
#[cfg(target_arch = "x86_64")]
fn cpuid(leaf: u32) -> std::arch::x86_64::CpuidResult {
    // Newer compilers need no such block.
    #[allow(unused_unsafe)]
    // SAFETY: every x86-64 processor has this instruction.
    unsafe {
        std::arch::x86_64::__cpuid_count(leaf, 0)
    }
}

/// Name of the vendor, as `cpuid` gives it.
#[cfg(target_arch = "x86_64")]
const INTEL: &[[u8; 4]; 3] = &[*b"Genu", *b"ineI", *b"ntel"];

/// Instruction sets that kernels exist for, from the plainest up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Isa {
    /// Plain Rust on fixed-size arrays; runs anywhere.
    Portable,
    /// 128-bit NEON (aarch64).
    Neon,
    /// NEON with bf16 products of matrices (`bfmmla`).
    NeonBf16,
    /// 256-bit AVX2 with FMA and F16C.
    Avx2,
    /// 512-bit AVX-512 F, BW, DQ and VL.
    Avx512,
    /// AVX-512 with bf16 dot products.
    Avx512Bf16,
    /// The same, with bf16 products of tiles (AMX; Linux).
    AmxBf16,
}

impl Isa {
    /// Every instruction set, from the plainest up.
    pub const ALL: [Isa; 7] = [
        Self::Portable,
        Self::Neon,
        Self::NeonBf16,
        Self::Avx2,
        Self::Avx512,
        Self::Avx512Bf16,
        Self::AmxBf16,
    ];

    /// Name as `MLX_FLASH_CPU_ISA` takes it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Neon => "neon",
            Self::NeonBf16 => "neonbf16",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Bf16 => "avx512bf16",
            Self::AmxBf16 => "amxbf16",
        }
    }

    /// Finds an instruction set by name.
    pub fn by_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|isa| isa.name() == name)
    }

    /// Whether this machine has it.
    pub fn is_available(self) -> bool {
        match self {
            Self::Portable => true,
            #[cfg(all(target_arch = "aarch64", not(miri)))]
            Self::Neon => std::arch::is_aarch64_feature_detected!("neon"),
            #[cfg(all(target_arch = "aarch64", not(miri)))]
            Self::NeonBf16 => {
                Self::Neon.is_available() && std::arch::is_aarch64_feature_detected!("bf16")
            }
            #[cfg(all(target_arch = "x86_64", not(miri)))]
            Self::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            #[cfg(all(target_arch = "x86_64", not(miri)))]
            Self::Avx512 => {
                Self::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            #[cfg(all(target_arch = "x86_64", not(miri)))]
            Self::Avx512Bf16 => {
                Self::Avx512.is_available() && is_x86_feature_detected!("avx512bf16")
            }
            #[cfg(all(target_arch = "x86_64", not(miri)))]
            Self::AmxBf16 => Self::Avx512Bf16.is_available() && amx_tiles_are_available(),
            #[allow(unreachable_patterns)]
            _ => false,
        }
    }

    /// The best that this machine has.
    pub fn best() -> Self {
        Self::ALL
            .into_iter()
            .rev()
            .find(|isa| isa.is_available() && isa.pays())
            .unwrap_or(Self::Portable)
    }

    /// Whether it beats the plainer ones on this machine. On a Xeon that has both, a bf16 dot product was
    /// measured at two cycles, the two multiply-adds that it stands for at one; on AMD it is twice as fast
    /// as they are.
    fn pays(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        if self == Self::Avx512Bf16 {
            let vendor = cpuid(0);
            return [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes) != *INTEL;
        }
        true
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Whether the processor has AMX tiles of bf16 and this process may use them. Linux grants them when
/// asked.
#[cfg(all(target_arch = "x86_64", not(miri)))]
fn amx_tiles_are_available() -> bool {
    use std::sync::LazyLock;
    static AVAILABLE: LazyLock<bool> = LazyLock::new(|| {
        if !cfg!(target_os = "linux") {
            return false;
        }
        // AMX-BF16 and AMX-TILE.
        let has = cpuid(7).edx;
        has & 1 << 22 != 0 && has & 1 << 24 != 0 && amx_tiles_are_granted()
    });
    *AVAILABLE
}

/// Asks the kernel for the tiles' state, and sees whether it was given.
#[cfg(all(target_arch = "x86_64", not(miri)))]
fn amx_tiles_are_granted() -> bool {
    use std::arch::asm;
    const ARCH_PRCTL: i64 = 158;
    const GET_PERMITTED: i64 = 0x1022;
    const REQUEST: i64 = 0x1023;
    const TILE_DATA: u64 = 18;
    let call = |code: i64, argument: u64| -> i64 {
        let result;
        // SAFETY: a system call of Linux on x86-64, which changes these registers; what it writes is
        // a number to the address that the caller gives.
        unsafe {
            asm!("syscall", inlateout("rax") ARCH_PRCTL => result, in("rdi") code, in("rsi") argument,
                out("rcx") _, out("r11") _, options(nostack));
        }
        result
    };
    let mut permitted = 0u64;
    call(REQUEST, TILE_DATA) == 0
        && call(GET_PERMITTED, (&raw mut permitted).addr() as u64) == 0
        && permitted >> TILE_DATA & 1 != 0
}
