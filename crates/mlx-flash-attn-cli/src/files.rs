//! Output files: they appear whole or not at all, and never replace the input.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

/// A file to be written, checked before the work that fills it.
#[derive(Debug)]
pub(crate) struct Target {
    /// As the user named it.
    named: PathBuf,
    /// Where it really lies: links are followed, so that they stay links.
    real: PathBuf,
    /// A device or a pipe: written to, never replaced.
    special: bool,
}

impl Target {
    /// Refuses a path that cannot be written, or that is one of `inputs`.
    pub(crate) fn new(path: &Path, inputs: &[&Path]) -> anyhow::Result<Self> {
        let named = path.display();
        let real = match fs::canonicalize(path) {
            Ok(real) => real,
            // A pipe behind /dev/stdout has no path of its own.
            Err(_) if fs::metadata(path).is_ok() => path.to_owned(),
            Err(_) if fs::symlink_metadata(path).is_ok() => {
                bail!("cannot write {named}: it is a link to nowhere")
            }
            Err(_) => path.to_owned(),
        };
        for input in inputs {
            if fs::canonicalize(input).is_ok_and(|input| input == real) {
                bail!("cannot write {named}: it is the input, which is never overwritten");
            }
        }
        let special = match fs::metadata(&real) {
            Ok(found) if found.is_dir() => bail!("cannot write {named}: it is a folder"),
            Ok(found) => !found.is_file(),
            Err(_) => false,
        };
        let target = Self {
            named: path.to_owned(),
            real,
            special,
        };
        if target.real.file_name().is_none() {
            bail!("cannot write {named}: expected the path of a file");
        }
        match fs::metadata(target.folder()) {
            Ok(folder) if folder.is_dir() => Ok(target),
            _ => bail!(
                "cannot write {named}: there is no folder {}",
                target.folder().display()
            ),
        }
    }

    fn folder(&self) -> &Path {
        match self.real.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        }
    }

    /// Writes the file.
    pub(crate) fn write(&self, bytes: &[u8]) -> anyhow::Result<()> {
        self.try_write(bytes)
            .with_context(|| format!("cannot write {}", self.named.display()))
    }

    fn try_write(&self, bytes: &[u8]) -> anyhow::Result<()> {
        if self.special {
            return Ok(fs::OpenOptions::new()
                .write(true)
                .open(&self.real)?
                .write_all(bytes)?);
        }
        let mut builder = tempfile::Builder::new();
        builder.prefix(".mlx-flash-attn-");
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            // Those of any new file; the process's umask narrows them.
            builder.permissions(fs::Permissions::from_mode(0o666));
        }
        let mut file = builder.tempfile_in(self.folder())?;
        file.write_all(bytes)?;
        file.as_file().sync_all()?;
        file.persist(&self.real)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replaces_whole_files_and_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        for text in ["first", "second"] {
            Target::new(&path, &[])
                .unwrap()
                .write(text.as_bytes())
                .unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn refuses_the_input_a_folder_and_a_missing_folder() {
        let dir = tempfile::tempdir().unwrap();
        let input = dir.path().join("in");
        fs::write(&input, "x").unwrap();
        let roundabout = dir.path().join(".").join("in");
        for path in [
            roundabout,
            dir.path().to_owned(),
            dir.path().join("no/out"),
            dir.path().join("in/out"),
            PathBuf::new(),
        ] {
            assert!(Target::new(&path, &[&input]).is_err(), "{path:?}");
        }
    }

    #[cfg(unix)]
    #[test]
    fn links_to_the_input_are_the_input_and_other_links_are_followed() {
        let dir = tempfile::tempdir().unwrap();
        let [input, real, link] = ["in", "real", "link"].map(|name| dir.path().join(name));
        fs::write(&input, "x").unwrap();
        fs::write(&real, "old").unwrap();
        std::os::unix::fs::symlink(&input, &link).unwrap();
        assert!(Target::new(&link, &[&input]).is_err());
        fs::remove_file(&link).unwrap();
        std::os::unix::fs::symlink(&real, &link).unwrap();
        Target::new(&link, &[&input])
            .unwrap()
            .write(b"new")
            .unwrap();
        assert_eq!(fs::read_to_string(&real).unwrap(), "new");
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    }

    #[cfg(unix)]
    #[test]
    fn devices_are_written_to_and_stay() {
        use std::os::unix::fs::FileTypeExt;
        let null = Path::new("/dev/null");
        Target::new(null, &[]).unwrap().write(b"x").unwrap();
        assert!(fs::metadata(null).unwrap().file_type().is_char_device());
    }
}
