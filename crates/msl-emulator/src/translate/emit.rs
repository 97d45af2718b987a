//! The C++ around the program: the shim before it, entry points and tables after it.

use std::fmt::Write as _;

use super::built_ins;
use super::constants::Constants;
use super::kernels::Kernels;
use super::pass::Pass;
use crate::reflect::{AddressSpace, ArgumentKind};

/// The whole C++ text.
pub(crate) fn program(
    body: &str,
    kernels: &Kernels,
    constants: &Constants,
    swizzles: &str,
    pass: Pass,
) -> String {
    let mut out = String::new();
    if pass == Pass::Types {
        out += "#define MSL_PASS_TYPES\n";
    }
    if pass == Pass::Registers {
        out += "#define MSL_PASS_REGISTERS\n";
    }
    out += swizzles;
    out += "#include \"metal.h\"\n";
    out += match pass {
        Pass::Types => {
            "#define device MSL_DEVICE\n#define constant MSL_CONSTANT const\n\
             #define threadgroup MSL_THREADGROUP\n"
        }
        Pass::Code | Pass::Registers => {
            "#define device\n#define constant const\n#define threadgroup\n"
        }
    };
    out +=
        "#define thread\n#define is_function_constant_defined(x) msl_fcdef_##x\n# 1 \"program\"\n";
    if pass == Pass::Registers {
        out += body;
    } else {
        // Hints for unrolling change no result here, and unrolled code takes twice as long to compile.
        for line in body.split_inclusive('\n') {
            out += if line.starts_with("#pragma clang loop") {
                "\n"
            } else {
                line
            };
        }
    }
    if pass == Pass::Code {
        tables(&mut out, kernels, constants);
    }
    if pass == Pass::Registers {
        out += "\n# 1 \"entries\"\n";
        for (n, e) in kernels.entries.iter().enumerate() {
            let _ = writeln!(
                out,
                "extern \"C\" void {ENTRY}{n}() {{ msl_rt::Entry<&{}>::call(); }}",
                e.function
            );
        }
    }
    out
}

/// Before its number, the function of the registers pass that holds one kernel and nothing else.
pub(crate) const ENTRY: &str = "msl_entry_";

fn tables(out: &mut String, kernels: &Kernels, constants: &Constants) {
    *out += "\n# 1 \"tables\"\n#undef device\n#undef constant\n#undef threadgroup\n#undef thread\n\
             #pragma clang attribute push(__attribute__((no_sanitize(\"thread\"))), apply_to = function)\n";
    let mut records = String::new();
    for (n, e) in kernels.entries.iter().enumerate() {
        let mut call = format!("msl_rt::invoke(&{}", e.function);
        for a in &e.info.arguments {
            let fetch = match &a.kind {
                ArgumentKind::Buffer {
                    index,
                    space: AddressSpace::Threadgroup,
                    ..
                } => format!("ArgArena<{index}>"),
                ArgumentKind::Buffer { index, .. } => format!("ArgBuffer<{index}>"),
                ArgumentKind::BuiltIn(name) => {
                    built_ins::fetcher(name).unwrap_or_default().to_owned()
                }
            };
            let _ = write!(call, ", msl_rt::{fetch}()");
        }
        let _ = writeln!(out, "static void msl_entry_{n}() {{ {call}); }}");
        let _ = writeln!(
            records,
            "  {{\"{}\", (const void *)&{}, msl_entry_{n}, msl_rt::Sizes<decltype(&{})>::value, {}, {}}},",
            e.info.name.escape_default(),
            e.function,
            e.function,
            e.info.arguments.len(),
            e.limit.as_deref().unwrap_or("0"),
        );
    }
    let _ = writeln!(
        out,
        "static const msl_rt::KernelRecord msl_kernels[] = {{\n{records}  {{}}}};"
    );
    *out += "static const msl_rt::ConstantRecord msl_constants[] = {\n";
    for c in &constants.declared {
        let _ = writeln!(
            out,
            "  {{{}, sizeof({p}), &{p}, &{}}},",
            c.info.index,
            c.defined_path(),
            p = c.path
        );
    }
    *out += "  {}};\nstatic const msl_rt::ConstantRecord msl_derived[] = {\n";
    for d in &constants.derived {
        let path = format!("{}{}", d.scope, d.name);
        let _ = writeln!(out, "  {{0, sizeof({path}), (void *)&{path}, nullptr}},");
    }
    *out += "  {}};\nstatic void msl_derive_all() {\n";
    for (n, d) in constants.derived.iter().enumerate() {
        let _ = writeln!(out, "  {}msl_derive_{n}();", d.scope);
    }
    *out += "}\nstatic void msl_derive(msl_rt::Worker *w) { msl_rt::run_alone(w, msl_derive_all); }\n\
             extern \"C\" __attribute__((visibility(\"default\"))) const msl_rt::Table msl_table;\n";
    let _ = writeln!(
        out,
        "const msl_rt::Table msl_table = {{MSL_ABI_VERSION, msl_rt::is_checked, msl_kernels, {}, msl_constants, \
         {}, msl_derived, {}, &msl_rt::threadgroup_records, msl_derive, msl_rt::run_group, msl_rt::fault_of, msl_rt::counts_of}};",
        kernels.entries.len(),
        constants.declared.len(),
        constants.derived.len(),
    );
    *out += "#pragma clang attribute pop\n";
}
