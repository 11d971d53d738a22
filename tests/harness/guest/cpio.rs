//! Writes initramfs archives in cpio's "newc" format, which is what the Linux kernel unpacks at boot
//! (Linux, Documentation/driver-api/early-userspace/buffer-format.rst). Archives may be concatenated; the kernel unpacks
//! them in turn, later files replacing earlier ones. Not here: reading archives, owners other than root, device nodes
//! other than the console.

use std::io::{self, Write};

const FILE: u32 = 0o100_000;
const DIRECTORY: u32 = 0o040_000;
const SYMLINK: u32 = 0o120_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

/// An archive being written to `out`. Call [`Archive::finish`], or the kernel sees no end of it.
pub struct Archive<W: Write> {
    out: W,
    written: u64,
    inode: u32,
    directories: std::collections::BTreeSet<String>,
}

impl<W: Write> Archive<W> {
    pub fn new(out: W) -> Self {
        Archive { out, written: 0, inode: 1, directories: Default::default() }
    }

    /// A regular file at `path` (no leading slash); its parent directories are made first.
    pub fn file(&mut self, path: &str, permissions: u32, content: &[u8]) -> io::Result<()> {
        self.parents(path)?;
        self.member(path, FILE | permissions, (0, 0), content)
    }

    pub fn directory(&mut self, path: &str) -> io::Result<()> {
        self.parents(path)?;
        if self.directories.insert(path.to_owned()) {
            self.member(path, DIRECTORY | 0o755, (0, 0), b"")?;
        }
        Ok(())
    }

    pub fn symlink(&mut self, path: &str, points_to: &str) -> io::Result<()> {
        self.parents(path)?;
        self.member(path, SYMLINK | 0o777, (0, 0), points_to.as_bytes())
    }

    /// `/dev/console`: the kernel opens it for init before init can mount anything.
    pub fn console(&mut self) -> io::Result<()> {
        self.parents("dev/console")?;
        self.member("dev/console", CHARACTER_DEVICE | 0o600, (5, 1), b"")
    }

    /// Writes the trailer and pads to 512 bytes, so that another archive may follow.
    pub fn finish(mut self) -> io::Result<W> {
        self.member("TRAILER!!!", 0, (0, 0), b"")?;
        self.pad_to(512)?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn parents(&mut self, path: &str) -> io::Result<()> {
        assert!(!path.starts_with('/') && !path.is_empty(), "archive paths are relative: {path:?}");
        let ends = path.match_indices('/').map(|(at, _)| at);
        for end in ends {
            let parent = &path[..end];
            if self.directories.insert(parent.to_owned()) {
                self.member(parent, DIRECTORY | 0o755, (0, 0), b"")?;
            }
        }
        Ok(())
    }

    fn member(&mut self, path: &str, mode: u32, (major, minor): (u32, u32), content: &[u8]) -> io::Result<()> {
        let size = u32::try_from(content.len())
            .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, format!("{path}: a newc member is at most 4 GiB")))?;
        // magic, then thirteen 8-digit hexadecimal fields: ino mode uid gid nlink mtime filesize devmajor devminor
        // rdevmajor rdevminor namesize (with its NUL) check
        let header = format!(
            "070701{:08x}{mode:08x}{:08x}{:08x}{:08x}{:08x}{size:08x}{:08x}{:08x}{major:08x}{minor:08x}{:08x}{:08x}",
            self.inode,
            0,
            0,
            1,
            0,
            0,
            0,
            path.len() + 1,
            0
        );
        self.inode += 1;
        self.put(header.as_bytes())?;
        self.put(path.as_bytes())?;
        self.put(b"\0")?;
        self.pad_to(4)?;
        self.put(content)?;
        self.pad_to(4)
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.written += bytes.len() as u64;
        self.out.write_all(bytes)
    }

    fn pad_to(&mut self, alignment: u64) -> io::Result<()> {
        let missing = (alignment - self.written % alignment) % alignment;
        self.put(&vec![0; missing as usize])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn archive_of_one_file_has_its_parents_first_and_ends_on_512_bytes() {
        let mut archive = Archive::new(Vec::new());
        archive.file("a/b/c", 0o755, b"hello").unwrap();
        let bytes = archive.finish().unwrap();
        assert_eq!(bytes.len() % 512, 0);
        let text = String::from_utf8_lossy(&bytes);
        let at = |needle: &str| text.find(needle).unwrap_or_else(|| panic!("{needle:?} absent"));
        assert!(at("a\0") < at("a/b\0") && at("a/b\0") < at("a/b/c\0") && at("a/b/c\0") < at("TRAILER!!!\0"));
        assert_eq!(&bytes[..6], b"070701");
    }

    #[test]
    fn archive_given_one_directory_twice_holds_it_once() {
        let mut archive = Archive::new(Vec::new());
        archive.directory("x").unwrap();
        archive.file("x/one", 0o644, b"1").unwrap();
        archive.directory("x").unwrap();
        let bytes = archive.finish().unwrap();
        assert_eq!(bytes.windows(6).filter(|w| w == b"070701").count(), 3, "x, x/one and the trailer");
    }
}
