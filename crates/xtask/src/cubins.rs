//! `cargo xtask-cuda cubins ARCH..`: that every CUDA kernel compiles without spills, but for those that may, and
//! without a complaint of the compiler's. No GPU is needed.
//!
//! A kernel whose text and options are in the manifest is not compiled again, but for one of each
//! text, which shows that the manifest still says what the compiler does.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;

use mlx_flash_attn::cuda::{Compiler, ImageSource};

use crate::manifest::{Entry, Manifest};
use crate::resources::Resources;

/// How much is compiled, and what becomes of it.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Options {
    /// Every kernel, not only those that the manifest lacks.
    pub(crate) all: bool,
    /// Writes the manifest instead of failing where it differs.
    pub(crate) update: bool,
}

/// Kernels between two writings of the manifest, so that a run that is stopped loses little.
const WRITE_EVERY: usize = 20;

fn path() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("cubins.txt")
}

/// Checks the kernels of each architecture.
pub(crate) fn run(archs: &[&str], options: Options) -> Result<(), String> {
    let compiler = Compiler::find().map_err(|e| e.to_string())?;
    let (major, minor) = compiler.version();
    let version = format!("{major}.{minor}");
    let text = std::fs::read_to_string(path()).unwrap_or_default();
    let mut manifest = Manifest::parse(&text).map_err(|e| format!("{}: {e}", path().display()))?;
    if manifest.compiler != version {
        if !options.update {
            return Err(format!(
                "the manifest is of NVRTC {}, this is {version}: name the other one in \
                 MLX_FLASH_NVRTC, or write the manifest anew with --update",
                manifest.compiler
            ));
        }
        manifest = Manifest {
            compiler: version,
            ..Manifest::default()
        };
    }
    let mut sources = Vec::new();
    for arch in archs {
        sources.extend(kernels(arch)?);
    }
    if sources.is_empty() {
        return Err("there is no kernel to compile".into());
    }

    let chosen = to_compile(&sources, &manifest, options);
    println!("{} kernels, {} to compile", sources.len(), chosen.len());
    let mut differences = Vec::new();
    let mut failed = None;
    each_compiled(&compiler, &chosen, |done, source, compiled| {
        let resources = match compiled {
            Ok(resources) => resources,
            Err(error) => {
                failed.get_or_insert(format!("{} {}: {error}", source.arch(), source.name()));
                return;
            }
        };
        println!(
            "{done}/{} {} {:>3} registers, {} bytes of stack, {} spilled: {}",
            chosen.len(),
            source.arch(),
            resources.registers,
            resources.stack,
            resources.spills,
            source.name()
        );
        let entry = Entry {
            arch: source.arch().into(),
            name: source.name(),
            resources,
        };
        let place = manifest.entries.get(&source.fingerprint());
        if let Some(difference) = difference(place, &entry) {
            differences.push(difference);
        }
        manifest.entries.insert(source.fingerprint(), entry);
        if options.update && done % WRITE_EVERY == 0 {
            failed = failed.take().or_else(|| write(&manifest).err());
        }
    });
    if let Some(error) = failed {
        return Err(error);
    }

    let known: BTreeSet<String> = sources.iter().map(ImageSource::fingerprint).collect();
    manifest.entries.retain(|fingerprint, entry| {
        let stays = known.contains(fingerprint) || !archs.contains(&&*entry.arch);
        if !stays {
            differences.push(format!("{} {}: is no more", entry.arch, entry.name));
        }
        stays
    });
    if options.update {
        write(&manifest)?;
        println!("{}: {} kernels", path().display(), manifest.entries.len());
        differences.clear();
    }
    let crowded = sources.iter().filter(|source| source.may_spill());
    let crowded: BTreeSet<String> = crowded.map(ImageSource::fingerprint).collect();
    let spilling = manifest.entries.iter().filter(|(fingerprint, entry)| {
        crowded.contains(*fingerprint) && entry.resources.spills > 0
    });
    println!("{} kernels spill, as they may", spilling.count());
    report(&faults(&manifest, &known, &crowded), &differences)
}

/// What differs between the manifest and a kernel that was compiled.
fn difference(listed: Option<&Entry>, compiled: &Entry) -> Option<String> {
    let what = match listed {
        None => "is not in the manifest".into(),
        Some(listed) if listed.resources.same(&compiled.resources) => return None,
        Some(listed) => format!(
            "the manifest says {:?}, the compiler {:?}",
            listed.resources, compiled.resources
        ),
    };
    Some(format!("{} {}: {what}", compiled.arch, compiled.name))
}

/// The faults of the kernels that are `known`, of which some are `crowded` and may spill.
fn faults(
    manifest: &Manifest,
    known: &BTreeSet<String>,
    crowded: &BTreeSet<String>,
) -> Vec<String> {
    let entries = manifest.entries.iter();
    entries
        .filter(|(fingerprint, _)| known.contains(*fingerprint))
        .flat_map(|(fingerprint, e)| {
            let may_spill = crowded.contains(fingerprint);
            let faults = e.resources.faults(may_spill).into_iter();
            faults.map(move |fault| format!("{} {}: {fault}", e.arch, e.name))
        })
        .collect()
}

fn report(faults: &[String], differences: &[String]) -> Result<(), String> {
    let mut message = String::new();
    if !faults.is_empty() {
        message += &format!("{} faults:\n{}\n", faults.len(), faults.join("\n"));
    }
    if !differences.is_empty() {
        message += &format!(
            "{} kernels differ from the manifest; `cubins --update` writes it anew:\n{}",
            differences.len(),
            differences.join("\n")
        );
    }
    if message.is_empty() {
        Ok(())
    } else {
        Err(message)
    }
}

/// The kernels that the manifest lacks, and the first of each text.
fn to_compile<'a>(
    sources: &'a [ImageSource],
    manifest: &Manifest,
    options: Options,
) -> Vec<&'a ImageSource> {
    let mut texts = BTreeSet::new();
    sources
        .iter()
        .filter(|source| {
            let sample = texts.insert(source.text()) && !options.update;
            sample || options.all || !manifest.entries.contains_key(&source.fingerprint())
        })
        .collect()
}

fn write(manifest: &Manifest) -> Result<(), String> {
    std::fs::write(path(), manifest.text()).map_err(|e| format!("{}: {e}", path().display()))
}

/// Compiles on all cores; `take` hears of each kernel on this thread, with how many are done.
fn each_compiled(
    compiler: &Compiler,
    sources: &[&ImageSource],
    mut take: impl FnMut(usize, &ImageSource, Result<Resources, String>),
) {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let (sender, receiver) = mpsc::channel();
        for _ in 0..threads.min(sources.len()) {
            let (sender, next) = (sender.clone(), &next);
            scope.spawn(move || {
                while let Some(source) = sources.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let compiled = compiler
                        .compile(source)
                        .map_err(|e| e.to_string())
                        .and_then(|image| Resources::read(&image.log));
                    // The receiver outlives the threads.
                    let _ = sender.send((*source, compiled));
                }
            });
        }
        drop(sender);
        for (done, (source, compiled)) in receiver.iter().enumerate() {
            take(done + 1, source, compiled);
        }
    });
}

/// The kernels of `arch`, each text and options once: the library launches some images in two ways.
fn kernels(arch: &str) -> Result<Vec<ImageSource>, String> {
    let mut all = ImageSource::all(arch).map_err(|e| e.to_string())?;
    let mut seen = BTreeSet::new();
    all.retain(|source| seen.insert(source.fingerprint()));
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry_of(source: &ImageSource) -> Entry {
        Entry {
            arch: source.arch().into(),
            name: source.name(),
            resources: Resources {
                registers: 1,
                ..Resources::default()
            },
        }
    }

    #[test]
    fn unchanged_kernels_are_not_compiled_again_but_for_one_of_each_text() {
        let sources = kernels("sm_90a").unwrap();
        let entries = sources.iter().map(|s| (s.fingerprint(), entry_of(s)));
        let mut manifest = Manifest {
            compiler: "13.0".into(),
            entries: entries.collect(),
        };
        assert_eq!(
            manifest.entries.len(),
            sources.len(),
            "fingerprints are unique"
        );
        let options = |all, update| Options { all, update };
        let count = |manifest: &Manifest, o| to_compile(&sources, manifest, o).len();
        let sample = count(&manifest, options(false, false));
        let texts: BTreeSet<String> = sources.iter().map(ImageSource::text).collect();
        assert_eq!(sample, texts.len());
        assert!(20 * sample < sources.len(), "a handful, got {sample}");
        assert_eq!(count(&manifest, options(false, true)), 0);
        assert_eq!(count(&manifest, options(true, false)), sources.len());
        // A changed kernel is one that the manifest lacks.
        let last = sources.last().unwrap();
        manifest.entries.remove(&last.fingerprint());
        assert_eq!(count(&manifest, options(false, true)), 1);
        assert_eq!(count(&manifest, options(false, false)), sample + 1);
    }

    #[test]
    fn a_kernel_that_the_manifest_lacks_or_tells_otherwise_fails_the_run() {
        let source = &ImageSource::all("sm_80").unwrap()[0];
        let compiled = entry_of(source);
        assert_eq!(difference(Some(&compiled), &compiled), None);
        assert!(
            difference(None, &compiled)
                .unwrap()
                .contains("not in the manifest")
        );
        let mut listed = compiled.clone();
        listed.resources.registers = 20;
        assert!(difference(Some(&listed), &compiled).is_some());
        listed.resources.spills = 8;
        let manifest = Manifest {
            compiler: String::new(),
            entries: [(source.fingerprint(), listed)].into(),
        };
        let known = BTreeSet::from([source.fingerprint()]);
        let faults = faults(&manifest, &known, &BTreeSet::new());
        assert_eq!(faults.len(), 1);
        assert!(report(&faults, &[]).is_err() && report(&[], &faults).is_err());
        assert!(report(&[], &[]).is_ok());
    }
}
