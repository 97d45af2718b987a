//! Params structs: one definition gives the host's struct and its text in the kernels' languages, so that
//! host and kernel cannot disagree.

/// Declares a `repr(C)` struct and the text of its twin in MSL and CUDA.
macro_rules! gpu_struct {
    (
        $(#[$meta:meta])*
        $name:ident = $twin:literal, $text:ident, $bytes:literal {
            $( $(#[$fmeta:meta])* $field:ident : $ty:tt = $decl:literal @ $offset:literal ),* $(,)?
        }
    ) => {
        $(#[$meta])*
        #[allow(unreachable_pub)] // Some are public.
        #[repr(C)]
        #[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
        pub struct $name { $( $(#[$fmeta])* pub $field: $ty, )* }

        #[doc = concat!("`", $twin, "` as the kernels declare it.")]
        pub(crate) const $text: &str = concat!(
            "struct ", $twin, " {\n", $( "    ", $decl, ";\n", )* "};\n"
        );

        const _: () = {
            assert!(size_of::<$name>() == $bytes);
            $( assert!(std::mem::offset_of!($name, $field) == $offset); )*
        };
    };
}
pub(crate) use gpu_struct;
