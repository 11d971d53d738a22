//! Finds kernel modules and the order to load them in, from the modules themselves: an unpacked kernel package has no
//! modules.dep, which is made when it is installed. Not here: soft dependencies, aliases, compressed modules.

use super::{At, GuestError, Result};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// All modules below one directory, by name with `-` written as `_`.
pub struct ModuleTree {
    files: BTreeMap<String, PathBuf>,
    builtin: Vec<String>,
}

impl ModuleTree {
    pub fn scan(root: &Path) -> Result<Self> {
        let mut files = BTreeMap::new();
        let mut pending = vec![root.to_owned()];
        while let Some(dir) = pending.pop() {
            for entry in std::fs::read_dir(&dir).at("list", &dir)? {
                let path = entry.at("list", &dir)?.path();
                if path.is_dir() {
                    pending.push(path);
                } else if path.extension().is_some_and(|e| e == "ko")
                    && let Some(stem) = path.file_stem().and_then(|s| s.to_str())
                {
                    files.insert(canonical(stem), path.clone());
                }
            }
        }
        let list = root.join("modules.builtin");
        let builtin = std::fs::read_to_string(&list)
            .at("read", &list)?
            .lines()
            .filter_map(|line| Path::new(line).file_stem().and_then(|s| s.to_str()).map(canonical))
            .collect();
        Ok(ModuleTree { files, builtin })
    }

    /// `wanted` and everything they depend on, each after what it needs. Names built into the kernel are left out.
    pub fn load_order(&self, wanted: &[&str]) -> Result<Vec<PathBuf>> {
        let mut order = Vec::new();
        for name in wanted {
            self.add(&canonical(name), &mut order, 0)?;
        }
        Ok(order)
    }

    fn add(&self, name: &str, order: &mut Vec<PathBuf>, depth: usize) -> Result<()> {
        if self.builtin.iter().any(|b| b == name) {
            return Ok(());
        }
        let path = self.files.get(name).ok_or_else(|| GuestError::Missing {
            what: format!("kernel module {name}"),
            remedy: "the guest kernel has it neither as a module nor built in; use Debian's cloud kernel".into(),
        })?;
        if order.contains(path) {
            return Ok(());
        }
        if depth > 32 {
            return Err(GuestError::failed(format!("kernel module {name}"), "its dependencies run in a circle"));
        }
        for needed in depends(&std::fs::read(path).at("read", path)?) {
            self.add(&needed, order, depth + 1)?;
        }
        order.push(path.clone());
        Ok(())
    }
}

fn canonical(name: &str) -> String {
    name.replace('-', "_")
}

/// The `depends=` string of a module's `.modinfo` section: NUL-separated `key=value` strings.
fn depends(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|w| w == KEY) else {
        return Vec::new();
    };
    let value = module[at + KEY.len()..].split(|b| *b == 0).next().unwrap_or_default();
    String::from_utf8_lossy(value).split(',').filter(|s| !s.is_empty()).map(canonical).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(modules: &[(&str, &str)], builtin: &str) -> (tempfile::TempDir, ModuleTree) {
        let dir = tempfile::tempdir().unwrap();
        for (name, needs) in modules {
            std::fs::write(dir.path().join(format!("{name}.ko")), format!("ELF\0license=GPL\0depends={needs}\0name=x\0")).unwrap();
        }
        std::fs::write(dir.path().join("modules.builtin"), builtin).unwrap();
        let tree = ModuleTree::scan(dir.path()).unwrap();
        (dir, tree)
    }

    #[test]
    fn load_order_of_a_chain_puts_what_is_needed_first_and_once() {
        let (_dir, tree) = tree(&[("nvme-tcp", "nvme-core,nvme-fabrics"), ("nvme-fabrics", "nvme-core")], "kernel/nvme-core.ko\n");
        let order = tree.load_order(&["nvme-tcp", "nvme_fabrics"]).unwrap();
        let names: Vec<_> = order.iter().map(|p| p.file_stem().unwrap().to_str().unwrap()).collect();
        assert_eq!(names, ["nvme-fabrics", "nvme-tcp"]);
    }

    #[test]
    fn load_order_of_an_absent_module_names_it() {
        let (_dir, tree) = tree(&[], "");
        let err = tree.load_order(&["uio"]).unwrap_err();
        assert!(err.to_string().contains("uio"), "{err}");
    }

    #[test]
    fn load_order_of_a_circle_ends_with_an_error() {
        let (_dir, tree) = tree(&[("a", "b"), ("b", "a")], "");
        assert!(tree.load_order(&["a"]).is_err());
    }
}
