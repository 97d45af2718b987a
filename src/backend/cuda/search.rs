//! Where NVRTC may lie.

use std::path::{Path, PathBuf};

/// The variable that names the library itself.
pub(super) const VARIABLE: &str = "MLX_FLASH_NVRTC";

/// File names by which the loader finds it.
#[cfg(not(windows))]
pub(super) const NAMES: &[&str] = &["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"];
/// File names by which the loader finds it.
#[cfg(windows)]
pub(super) const NAMES: &[&str] = &["nvrtc64_130_0.dll", "nvrtc64_120_0.dll"];

/// Candidates, best first: what the variable names and nothing else, or the loader's own names, then
/// the CUDA toolkit, then packages of Python environments.
pub(super) fn candidates(variable: impl Fn(&str) -> Option<PathBuf>) -> Vec<PathBuf> {
    if let Some(path) = variable(VARIABLE) {
        return vec![path];
    }
    let mut all: Vec<PathBuf> = NAMES.iter().map(PathBuf::from).collect();
    let mut folders = Vec::new();
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(&variable);
    for home in homes.chain(toolkits(Path::new("/usr/local"))) {
        folders
            .extend(["lib64", "lib", "bin", "targets/x86_64-linux/lib"].map(|lib| home.join(lib)));
    }
    let environments = ["VIRTUAL_ENV", "CONDA_PREFIX"]
        .into_iter()
        .filter_map(&variable)
        .chain(["/usr", "/usr/local"].map(PathBuf::from));
    for packages in environments.flat_map(|root| site_packages(&root)) {
        folders.extend(["nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib"].map(|lib| packages.join(lib)));
    }
    all.extend(
        folders
            .iter()
            .flat_map(|folder| NAMES.iter().map(move |name| folder.join(name)))
            .filter(|path| path.is_file()),
    );
    all
}

/// `cuda`, then `cuda-*` with the newest first.
fn toolkits(root: &Path) -> Vec<PathBuf> {
    let mut found = entries(root, |name| name.starts_with("cuda-"));
    found.sort();
    found.push(root.join("cuda"));
    found.reverse();
    found
}

/// The package folders of the Python environment at `root`.
fn site_packages(root: &Path) -> Vec<PathBuf> {
    let lib = root.join("lib");
    let mut found: Vec<PathBuf> = entries(&lib, |name| name.starts_with("python3"))
        .into_iter()
        .flat_map(|python| ["site-packages", "dist-packages"].map(|packages| python.join(packages)))
        .collect();
    found.push(root.join("Lib").join("site-packages"));
    found
}

fn entries(folder: &Path, keep: impl Fn(&str) -> bool) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_name().to_str().is_some_and(&keep))
        .map(|entry| entry.path())
        .collect()
}

/// Libraries beside NVRTC that it opens by name. Loading them first spares the loader a search.
pub(super) fn builtins_beside(library: &Path) -> Vec<PathBuf> {
    let Some(folder) = library.parent().filter(|f| !f.as_os_str().is_empty()) else {
        return Vec::new();
    };
    entries(folder, |name| {
        name.starts_with("libnvrtc-builtins.so") || name.starts_with("nvrtc-builtins")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_variable_stands_alone() {
        let only = candidates(|name| (name == VARIABLE).then(|| PathBuf::from("/x/libnvrtc.so")));
        assert_eq!(only, [PathBuf::from("/x/libnvrtc.so")]);
    }

    #[test]
    fn a_toolkit_and_a_python_environment_are_searched_in_this_order() {
        let root = std::env::temp_dir().join(format!("mlx-flash-nvrtc-{}", std::process::id()));
        let name = NAMES[0];
        let toolkit = root.join("toolkit/lib64");
        let wheel = root.join("venv/lib/python3.12/site-packages/nvidia/cu13/lib");
        for folder in [&toolkit, &wheel] {
            std::fs::create_dir_all(folder).unwrap();
            std::fs::write(folder.join(name), b"").unwrap();
        }
        std::fs::write(wheel.join("libnvrtc-builtins.so.13.0"), b"").unwrap();
        let found = candidates(|variable| match variable {
            "CUDA_HOME" => Some(root.join("toolkit")),
            "VIRTUAL_ENV" => Some(root.join("venv")),
            _ => None,
        });
        let at = |path: PathBuf| found.iter().position(|p| *p == path).unwrap();
        assert_eq!(found[0], PathBuf::from(name));
        assert!(at(toolkit.join(name)) < at(wheel.join(name)));
        let beside = builtins_beside(&wheel.join(name));
        assert_eq!(beside, [wheel.join("libnvrtc-builtins.so.13.0")]);
        std::fs::remove_dir_all(root).unwrap();
    }
}
