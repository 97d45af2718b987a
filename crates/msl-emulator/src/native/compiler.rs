//! The C++ compiler: found once, then run for each pass.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use super::cache::{self, Hash};
use super::shim::Headers;
use crate::error::{Error, Result};
use crate::options::CompileOptions;

struct Compiler {
    path: PathBuf,
    version: String,
}

fn compiler() -> Result<&'static Compiler> {
    static FOUND: OnceLock<std::result::Result<Compiler, String>> = OnceLock::new();
    FOUND
        .get_or_init(find)
        .as_ref()
        .map_err(|e| Error::NoCompiler(e.clone()))
}

/// Finds the C++ compiler: `MSL_EMULATOR_CXX`, else `clang++`, else `clang++-16` to `-22`.
///
/// # Errors
/// [`Error::NoCompiler`] when none of them runs.
pub fn find_compiler() -> Result<PathBuf> {
    compiler().map(|c| c.path.clone())
}

fn find() -> std::result::Result<Compiler, String> {
    if let Some(chosen) = std::env::var_os("MSL_EMULATOR_CXX").filter(|v| !v.is_empty()) {
        let path = PathBuf::from(chosen);
        return version(&path).map_or_else(
            || {
                Err(format!(
                    "MSL_EMULATOR_CXX is {}, which is no clang++ that runs",
                    path.display()
                ))
            },
            |version| {
                Ok(Compiler {
                    path: path.clone(),
                    version,
                })
            },
        );
    }
    let names =
        std::iter::once("clang++".to_owned()).chain((16..=22).map(|n| format!("clang++-{n}")));
    for name in names {
        let path = PathBuf::from(name);
        if let Some(version) = version(&path).filter(|v| major(v) >= 16) {
            return Ok(Compiler { path, version });
        }
    }
    Err("none of clang++, clang++-16 to clang++-22 runs; install clang 16 or later, or set MSL_EMULATOR_CXX"
        .into())
}

fn version(path: &Path) -> Option<String> {
    let out = Command::new(path)
        .arg("--version")
        .stdin(Stdio::null())
        .output()
        .ok()?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    (out.status.success() && text.contains("clang")).then_some(text)
}

fn major(version: &str) -> u32 {
    // Apple numbers its own releases; 15 is the first with what is needed here.
    let floor = if version.contains("Apple") { 1 } else { 0 };
    let number = version
        .split("version ")
        .nth(1)
        .and_then(|v| v.split('.').next())
        .and_then(|v| v.parse().ok());
    number.unwrap_or(0u32) + floor
}

fn target_flags() -> &'static [&'static str] {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::is_x86_feature_detected as has;
        if has!("avx2") && has!("fma") && has!("f16c") && has!("bmi2") {
            return &["-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mpopcnt"];
        }
        &[]
    }
    #[cfg(target_arch = "aarch64")]
    {
        if std::arch::is_aarch64_feature_detected!("fp16") {
            return &["-march=armv8.2-a+fp16"];
        }
        &[]
    }
}

const COMMON: &[&str] = &[
    "-x",
    "c++",
    "-fdeclspec",
    "-fno-exceptions",
    "-fno-rtti",
    "-nostdinc",
    "-nostdinc++",
    "-fno-color-diagnostics",
    "-fno-caret-diagnostics",
    "-Wno-everything",
];

const CODE: &[&str] = &[
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-threadsafe-statics",
    "-fno-math-errno",
    "-fno-stack-protector",
    "-ffp-contract=off",
    "-Werror=vla",
    // A fiber's stack is 192 KiB.
    "-Werror=frame-larger-than=131072",
];

const FAST: &[&str] = &["-O2"];

/// The sanitizer only places the calls; the shim answers them. Without vectors every access has a
/// size that it knows.
const CHECKED: &[&str] = &[
    "-O1",
    "-DMSL_CHECKED",
    "-gline-tables-only",
    "-fsanitize=thread",
    "-fno-vectorize",
    "-fno-slp-vectorize",
    "-ftrivial-auto-var-init=pattern",
    "-mllvm",
    "-tsan-instrument-read-before-write=1",
    "-mllvm",
    "-tsan-instrument-func-entry-exit=0",
    "-mllvm",
    "-tsan-instrument-atomics=0",
];

/// Everything that decides what the compiler makes of a text.
pub(crate) fn fingerprint() -> Result<u128> {
    let mut hash = Hash::new();
    let c = compiler()?;
    hash.add(c.path.as_os_str().as_encoded_bytes());
    hash.add(c.version.as_bytes());
    for flag in [target_flags(), COMMON, CODE, FAST, CHECKED].concat() {
        hash.add(flag.as_bytes());
    }
    Ok(hash.value())
}

struct Output {
    ok: bool,
    stdout: Vec<u8>,
    log: String,
}

fn run(args: &[&str], paths: &[&Path], input: &[u8]) -> Result<Output> {
    let compiler = compiler()?;
    let fail = |e| Error::io(&compiler.path, e);
    let mut child = Command::new(&compiler.path)
        .args(args)
        .args(paths)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(fail)?;
    let stdin = child.stdin.take();
    let out = std::thread::scope(|s| {
        s.spawn(move || {
            // A compiler that stops reading says why on stderr.
            stdin.map(|mut pipe| pipe.write_all(input));
        });
        child.wait_with_output()
    })
    .map_err(fail)?;
    Ok(Output {
        ok: out.status.success(),
        stdout: out.stdout,
        log: String::from_utf8_lossy(&out.stderr).into_owned(),
    })
}

/// Expands includes and macros; line markers stay.
pub(crate) fn preprocess(
    source: &str,
    options: &CompileOptions,
    headers: &Headers,
) -> Result<String> {
    let mut args: Vec<String> = COMMON.iter().map(|s| (*s).to_owned()).collect();
    args.extend(
        [
            "-E",
            "-std=c++14",
            "-D__METAL__=1",
            "-D__METAL_VERSION__=310",
            "-D__METAL_MACOS__=1",
            "-D__HAVE_BFLOAT__=1",
        ]
        .map(str::to_owned),
    );
    args.push(format!("-I{}", headers.macros.display()));
    args.extend(
        options
            .include_dirs
            .iter()
            .map(|d| format!("-I{}", d.display())),
    );
    args.extend(options.defines.iter().map(|(k, v)| format!("-D{k}={v}")));
    args.push("-".into());
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let input = format!("# 1 \"{}\"\n{source}\n", options.name.escape_default());
    let out = run(&args, &[], input.as_bytes())?;
    if !out.ok {
        return Err(Error::Compile { log: out.log });
    }
    String::from_utf8(out.stdout).map_err(|_| Error::Compile {
        log: "the text is not UTF-8".into(),
    })
}

/// Checks types with real address spaces.
pub(crate) fn check_types(code: &str, headers: &Headers) -> Result<()> {
    let include = format!("-I{}", headers.shim.display());
    let args = [
        COMMON,
        &[
            "-std=c++14",
            "-fsyntax-only",
            "-ferror-limit=0",
            // `__fp16`, the stand-in for bfloat, computes and is passed as any other type.
            "-Xclang",
            "-fnative-half-type",
            "-Xclang",
            "-fnative-half-arguments-and-returns",
            &include,
            "-",
        ],
    ]
    .concat();
    let out = run(&args, &[], code.as_bytes())?;
    let log = genuine_errors(&out.log);
    if out.ok || log.is_empty() {
        Ok(())
    } else {
        Err(Error::Compile { log })
    }
}

/// Drops complaints about members of objects in named address spaces: Metal gives classes the
/// copies and overloads for them, plain clang does not. Pass B has compiled these lines.
fn genuine_errors(log: &str) -> String {
    let mut out = String::new();
    let mut keep = false;
    for line in log.lines() {
        let is_error = line.contains(": error: ");
        if is_error {
            let harmless = [
                "no viable overloaded",
                "no matching constructor for",
                "object parameter",
                "'this' argument",
            ];
            let mixed = [
                "incompatible operand types",
                "no matching conversion for functional-style cast",
            ];
            let classes = mixed.iter().any(|m| line.contains(m)) && !line.contains('*');
            keep = !classes && !harmless.iter().any(|h| line.contains(h));
        } else if !line.contains(": note: ") || line.contains("/cxx/") {
            continue;
        }
        if keep {
            out.push_str(&readable(line));
            out.push('\n');
        }
    }
    out
}

/// Names types and address spaces as the program does.
fn readable(line: &str) -> String {
    [
        ("__attribute__((address_space(1)))", "device"),
        ("__attribute__((address_space(2)))", "constant"),
        ("__attribute__((address_space(3)))", "threadgroup"),
        ("MSL_DEVICE", "device"),
        ("MSL_CONSTANT", "constant"),
        ("MSL_THREADGROUP", "threadgroup"),
        ("address space '1'", "address space 'device'"),
        ("address space '2'", "address space 'constant'"),
        ("address space '3'", "address space 'threadgroup'"),
        ("generic address space", "address space 'thread'"),
        ("_Float16", "half"),
        ("__fp16", "bfloat"),
    ]
    .iter()
    .fold(line.to_owned(), |text, (from, to)| text.replace(from, to))
}

/// Optimises C++ of the registers pass for a GPU and gives LLVM's text of it. `defines` fix the function
/// constants.
pub(crate) fn optimised(code: &str, defines: &[String], headers: &Headers) -> Result<String> {
    let include = format!("-I{}", headers.shim.display());
    let defines: Vec<&str> = defines.iter().map(String::as_str).collect();
    let flags = [
        "--target=spir64",
        "-std=c++17",
        "-O2",
        "-ffp-contract=off",
        "-fno-math-errno",
        "-fno-vectorize",
        "-fno-slp-vectorize",
        "-fno-discard-value-names",
        "-emit-llvm",
        "-S",
        "-o",
        "-",
    ];
    let args = [COMMON, &flags, &[&include], &defines, &["-"]].concat();
    let out = run(&args, &[], code.as_bytes())?;
    if !out.ok {
        return Err(Error::Compile {
            log: readable(&out.log),
        });
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

/// Compiles C++ to a shared object at `path`.
pub(crate) fn build(code: &str, checked: bool, headers: &Headers, path: &Path) -> Result<()> {
    let include = format!("-I{}", headers.shim.display());
    let object = cache::temporary(&path.with_extension("o"));
    let shared = cache::temporary(path);
    let mode = if checked { CHECKED } else { FAST };
    let args = [
        COMMON,
        CODE,
        mode,
        target_flags(),
        &[&include, "-c", "-", "-o"],
    ]
    .concat();
    let compiled = run(&args, &[&object], code.as_bytes())?;
    if !compiled.ok {
        return Err(Error::Compile {
            log: readable(&compiled.log),
        });
    }
    let linked = run(
        &["-shared", "-nostdlib++", "-o"],
        &[&shared, &object, Path::new("-lm")],
        b"",
    );
    let _ = std::fs::remove_file(&object);
    let linked = linked?;
    if !linked.ok {
        return Err(Error::Compile { log: linked.log });
    }
    cache::publish(&shared, path)
}
