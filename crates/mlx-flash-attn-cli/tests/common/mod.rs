//! What the tests of the program share: running it, and files for it.
#![allow(dead_code, clippy::unwrap_used, clippy::panic)]

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize};

/// What a run of the program left.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// The program, free of the caller's choice of device.
pub(crate) fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mlx-flash-attn"));
    command.env_remove("MLX_FLASH_DEVICE");
    command.stdin(Stdio::null());
    command
}

pub(crate) fn run<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Ran {
    let output = program().args(args).output().unwrap();
    Ran {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// Runs a command line of words without spaces.
pub(crate) fn words(line: &str) -> Ran {
    run(line.split_whitespace())
}

/// The real input in the repository.
pub(crate) fn real_input() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../data/mpnet_layer0.safetensors")
}

/// Tensors by name.
#[derive(Debug, Clone, Default)]
pub(crate) struct File(Vec<(&'static str, Dtype, Vec<usize>, Vec<u8>)>);

impl File {
    /// q, k and v in bf16, head-major.
    pub(crate) fn qkv(q: [usize; 4], kv: [usize; 4]) -> Self {
        Self::default()
            .with("q", Dtype::BF16, &q)
            .with("k", Dtype::BF16, &kv)
            .with("v", Dtype::BF16, &kv)
    }

    /// Adds or replaces a tensor of small numbers (or booleans).
    pub(crate) fn with(self, name: &'static str, dtype: Dtype, shape: &[usize]) -> Self {
        let n: usize = shape.iter().product();
        let salt = name.len() as f32 + f32::from(name.as_bytes()[0]);
        let value = |i: usize| ((i as f32 * 0.37 + salt).sin() * 1.5, i % 3 != 1);
        let bytes: Vec<u8> = (0..n)
            .flat_map(|i| match dtype {
                Dtype::BF16 => half::bf16::from_f32(value(i).0).to_le_bytes().to_vec(),
                Dtype::F16 => half::f16::from_f32(value(i).0).to_le_bytes().to_vec(),
                Dtype::F32 => value(i).0.to_le_bytes().to_vec(),
                Dtype::BOOL | Dtype::U8 => vec![u8::from(value(i).1)],
                other => vec![1; other.bitsize() / 8],
            })
            .collect();
        self.with_bytes(name, dtype, shape, bytes)
    }

    pub(crate) fn with_bytes(
        self,
        name: &'static str,
        dtype: Dtype,
        shape: &[usize],
        bytes: Vec<u8>,
    ) -> Self {
        let mut file = self.without(name);
        file.0.push((name, dtype, shape.to_vec(), bytes));
        file
    }

    pub(crate) fn without(mut self, name: &str) -> Self {
        self.0.retain(|(n, ..)| *n != name);
        self
    }

    /// The bytes of a tensor.
    pub(crate) fn bytes(&self, name: &str) -> &[u8] {
        &self.0.iter().find(|(n, ..)| *n == name).unwrap().3
    }

    pub(crate) fn write(&self, path: &Path) {
        let views = self.0.iter().map(|(name, dtype, shape, bytes)| {
            (
                *name,
                TensorView::new(*dtype, shape.clone(), bytes).unwrap(),
            )
        });
        std::fs::write(path, serialize(views, None).unwrap()).unwrap();
    }
}

/// Dtype, shape and bytes of a tensor in a file.
pub(crate) fn tensor(path: &Path, name: &str) -> (Dtype, Vec<usize>, Vec<u8>) {
    let bytes = std::fs::read(path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let view = tensors.tensor(name).unwrap();
    (view.dtype(), view.shape().to_vec(), view.data().to_vec())
}

/// The keys of the object on each line.
pub(crate) fn json_lines(text: &str) -> Vec<serde_json::Map<String, serde_json::Value>> {
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{line}: {e}")))
        .collect()
}

pub(crate) fn assert_keys(object: &serde_json::Map<String, serde_json::Value>, keys: &[&str]) {
    let mut expected: Vec<&str> = keys.to_vec();
    expected.sort_unstable();
    let mut found: Vec<&str> = object.keys().map(String::as_str).collect();
    found.sort_unstable();
    assert_eq!(found, expected);
}

/// A run that refused its input with a message that names the culprit.
pub(crate) fn assert_refused(ran: &Ran, culprit: &str, what: &str) {
    assert_eq!(ran.code, Some(2), "{what}: {ran:?}");
    assert!(
        ran.stderr.contains(culprit),
        "{what}: expected `{culprit}` in {ran:?}"
    );
    assert!(ran.stderr.starts_with("error: "), "{what}: {ran:?}");
    assert!(!ran.stderr.contains("panicked"), "{what}: {ran:?}");
    assert!(ran.stdout.is_empty(), "{what}: {ran:?}");
}

/// `run` on `input` with extra words; nothing may be left in the folder but the input.
pub(crate) fn assert_run_refused(input: &Path, options: &str, culprit: &str, what: &str) {
    let folder = input.parent().unwrap();
    let before = std::fs::read(input).ok();
    let files = || std::fs::read_dir(folder).unwrap().count();
    let count = files();
    let mut args: Vec<_> = ["run", "-i"].map(Into::into).to_vec();
    args.push(input.as_os_str().to_owned());
    args.push("-o".into());
    args.push(folder.join("out.safetensors").into());
    args.extend(options.split_whitespace().map(Into::into));
    assert_refused(&run(args), culprit, what);
    assert_eq!(files(), count, "{what}: something was written");
    assert_eq!(
        std::fs::read(input).ok(),
        before,
        "{what}: the input changed"
    );
}
