//! The build script of sys/ffi (`build = "../../build.rs"`), and the only one that looks for SPDK.
//!
//! Finds SPDK, refuses any version but the one Penstock binds to, compiles the C shim, runs bindgen over the headers of
//! that very tree, and tells rustc how to link it. It never downloads or builds SPDK: `make spdk` does.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What the VERSION file of the tree must say.
const SPDK_VERSION: &str = "26.01.0";

/// The pkg-config modules that cover what the daemon uses. Their constructors register subsystems, bdev modules,
/// transports and socket layers, so a module that is not named here does not exist at run time.
const MODULES: &[&str] = &[
    "spdk_event",
    "spdk_event_bdev",
    "spdk_event_accel",
    "spdk_event_iobuf",
    "spdk_event_keyring",
    "spdk_event_sock",
    "spdk_event_nvmf",
    "spdk_event_vhost_blk",
    "spdk_event_ublk",
    "spdk_event_scheduler",
    "spdk_bdev_malloc",
    "spdk_bdev_nvme",
    "spdk_bdev_null",
    "spdk_bdev_delay",
    "spdk_bdev_passthru", // the peer of benchmark 6; it takes only what it is told to
    "spdk_bdev_error",
    "spdk_sock_posix",
    "spdk_env_dpdk",
    "spdk_env_dpdk_rpc",
    "spdk_rpc",
    "spdk_jsonrpc",
    "spdk_json",
];

/// Libraries that pkg-config names as dependencies of the bdev subsystem, and that must stay out. Some read every new bdev
/// in search of tables and superblocks of their own; the uring socket layer would take over from posix and cannot sleep.
const LEFT_OUT: &[&str] = &[
    "spdk_bdev_gpt",
    "spdk_bdev_lvol",
    "spdk_bdev_raid",
    "spdk_bdev_ftl",
    "spdk_bdev_split",
    "spdk_bdev_zone_block",
    "spdk_bdev_uring",
    "spdk_bdev_aio",
    "spdk_blob_bdev",
    "spdk_blob",
    "spdk_lvol",
    "spdk_ftl",
    "spdk_sock_uring",
];

/// Functions that the safe layer calls; everything else stays out of the bindings.
const FUNCTIONS: &[&str] = &[
    "ps_.*",
    "spdk_get_thread",
    "spdk_set_thread",
    "spdk_get_ticks",
    "spdk_get_ticks_hz",
    "spdk_thread_(send_msg|exit|get_app_thread|get_id|is_exited|is_running|get_name)",
    "spdk_poller_(register_named|unregister|pause|resume)",
    "spdk_interrupt_(register|unregister|mode_is_enabled)",
    "spdk_put_io_channel",
    "spdk_(malloc|zmalloc|free)",
    "spdk_mem_(register|unregister)",
    "spdk_bdev_(open_ext|close|desc_get_bdev|get_by_name|get_io_channel|get_name|get_product_name|get_module_name)",
    "spdk_bdev_(readv_blocks|writev_blocks|flush_blocks|unmap_blocks|write_zeroes_blocks|reset|free_io)",
    "spdk_bdev_(first|next)",
    "spdk_nvmf_get_tgt",
    "spdk_nvmf_tgt_(find_subsystem|get_transport)",
    "spdk_nvmf_subsystem_(destroy|start|stop|pause|resume|set_allow_any_host|add_host|remove_host|set_sn|set_mn)",
    "spdk_nvmf_subsystem_(set_ana_reporting|set_cntlid_range|remove_ns|get_nqn)",
    "spdk_vhost_set_socket_path",
    "spdk_log_set_flag",
    "spdk_sock_(listen|accept|close|recv|readv|flush|is_connected)",
    "spdk_sock_group_(create|close|add_sock|remove_sock|poll|get_interruptfd)",
];

fn main() {
    let tree = find_tree();
    let include = tree.join("build/include");
    let ffi = PathBuf::from(env::var("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let out = PathBuf::from(env::var("OUT_DIR").expect("cargo sets it"));

    compile_shim(&tree, &include, &ffi);
    generate_bindings(&tree, &include, &ffi, &out);
    link(&tree);
    println!("cargo:rustc-env=PENSTOCK_SPDK_TREE={}", tree.display());
}

/// Where SPDK is: SPDK_DIR if set, else the link that `make spdk` keeps in the cache.
fn find_tree() -> PathBuf {
    for variable in ["SPDK_DIR", "PENSTOCK_CACHE", "HOME"] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    let place = match env::var_os("SPDK_DIR") {
        Some(dir) if !dir.is_empty() => PathBuf::from(dir),
        _ => cache().join("spdk"),
    };
    let version_file = place.join("VERSION");
    println!("cargo:rerun-if-changed={}", version_file.display());
    let Ok(found) = std::fs::read_to_string(&version_file) else {
        fail(&format!("no SPDK at {}: SPDK {SPDK_VERSION} is needed. Run `make spdk`, or set SPDK_DIR to a built tree.", place.display()));
    };
    if found.trim() != SPDK_VERSION {
        fail(&format!(
            "{} is SPDK {}, but SPDK {SPDK_VERSION} is needed and no other will do. Run `make spdk`, or set SPDK_DIR.",
            place.display(),
            found.trim()
        ));
    }
    let tree = place.canonicalize().unwrap_or_else(|e| fail(&format!("cannot resolve {}: {e}", place.display())));
    // Watched through the link: cargo compares times, and the library of another tree was built at another time. The tree's
    // VERSION has the time of its source, and the path of the tree before never changes.
    let library = place.join("build/lib/libspdk_bdev.a");
    println!("cargo:rerun-if-changed={}", library.display());
    if !library.exists() {
        fail(&format!("SPDK at {} is not built ({} is missing). Run `make spdk`.", tree.display(), library.display()));
    }
    tree
}

fn cache() -> PathBuf {
    match env::var_os("PENSTOCK_CACHE") {
        Some(dir) if !dir.is_empty() => PathBuf::from(dir),
        _ => PathBuf::from(env::var_os("HOME").unwrap_or_else(|| fail("neither PENSTOCK_CACHE nor HOME is set"))).join(".cache/penstock"),
    }
}

fn include_dirs(tree: &Path, include: &Path, ffi: &Path) -> Vec<PathBuf> {
    vec![
        include.to_path_buf(),
        tree.join("include"),
        tree.join("lib/nvmf"),           // nvmf_internal.h: passthrough, host identity
        tree.join("lib/vhost"),          // vhost_internal.h: sessions
        tree.join("lib/jsonrpc"),        // jsonrpc_internal.h: error data
        tree.join("dpdk/build/include"), // for vhost_internal.h
        tree.join("module/bdev/malloc"), // bdev_malloc.h: malloc bdevs without JSON-RPC
        tree.join("module/bdev/nvme"),   // bdev_nvme.h: the path id that detaching takes
        ffi.join("src"),
    ]
}

fn compile_shim(tree: &Path, include: &Path, ffi: &Path) {
    let mut build = cc::Build::new();
    for dir in include_dirs(tree, include, ffi) {
        build.include(dir);
    }
    build.std("gnu11").define("_GNU_SOURCE", None).flag("-march=x86-64-v3").opt_level(2).debug(true);
    build.flag("-fno-strict-aliasing"); // as SPDK itself is built; its trees pun pointers
    // SPDK's own headers are not clean under these; ours are checked by -Wall.
    build.flag("-Wno-unused-parameter").flag("-Wno-sign-compare").flag("-Wno-address-of-packed-member");
    for file in ["shim_app.c", "shim_bdev.c", "shim_module.c", "shim_nvmf.c", "shim_rpc.c", "shim_vhost.c"] {
        let path = ffi.join("src").join(file);
        println!("cargo:rerun-if-changed={}", path.display());
        build.file(path);
    }
    for header in ["shim.h", "wrapper.h"] {
        println!("cargo:rerun-if-changed={}", ffi.join("src").join(header).display());
    }
    // Its constructor registers the bdev module, so the linker must take it whole.
    build.link_lib_modifier("+whole-archive").compile("penstock_shim");
}

fn generate_bindings(tree: &Path, include: &Path, ffi: &Path, out: &Path) {
    let mut builder = bindgen::Builder::default()
        .header(ffi.join("src/wrapper.h").display().to_string())
        .clang_args(include_dirs(tree, include, ffi).iter().map(|dir| format!("-I{}", dir.display())))
        .allowlist_type("ps_.*")
        .allowlist_var("SPDK_BDEV_IO_TYPE_.*|SPDK_BDEV_EVENT_.*|PS_.*|SPDK_LOG_(ERROR|WARN|NOTICE|INFO|DEBUG)")
        .allowlist_type("spdk_bdev_io_type|spdk_bdev_event_type|spdk_nvme_ana_state|spdk_log_level|spdk_thread_poller_rc")
        // Only ever behind pointers; their layout is C's business, and some are packed and aligned at once.
        .opaque_type("spdk_(bdev|nvme|nvmf|json).*_(io|opts|cmd|cpl|module|val|request|transport_id)")
        .blocklist_type("iovec")
        .raw_line("pub use libc::iovec;")
        .default_enum_style(bindgen::EnumVariation::Consts)
        .prepend_enum_name(false)
        .layout_tests(false)
        .generate_comments(false)
        .formatter(bindgen::Formatter::None)
        .rust_target(bindgen::RustTarget::stable(85, 0).unwrap_or_else(|_| fail("bindgen knows no such Rust")))
        .rust_edition(bindgen::RustEdition::Edition2024);
    for function in FUNCTIONS {
        builder = builder.allowlist_function(function);
    }
    let bindings = builder.generate().unwrap_or_else(|e| fail(&format!("bindgen over {}: {e}", tree.display())));
    bindings.write_to_file(out.join("bindings.rs")).unwrap_or_else(|e| fail(&format!("cannot write the bindings: {e}")));
}

/// SPDK and DPDK as whole archives (their constructors vanish otherwise), ISA-L as plain ones, the rest dynamic.
fn link(tree: &Path) {
    let path = [tree.join("build/lib/pkgconfig"), tree.join("dpdk/build/lib/pkgconfig")]
        .iter()
        .map(|dir| dir.display().to_string())
        .collect::<Vec<_>>()
        .join(":");
    let mut command = Command::new("pkg-config");
    command.env("PKG_CONFIG_PATH", &path).args(["--static", "--libs"]).args(MODULES).arg("spdk_syslibs");
    let output = command.output().unwrap_or_else(|e| fail(&format!("cannot run pkg-config (package pkg-config): {e}")));
    if !output.status.success() {
        fail(&format!("pkg-config over {path}: {}", String::from_utf8_lossy(&output.stderr)));
    }
    // libvfio-user's directory is in no pkg-config file; SPDK's makefiles know it.
    let mut dirs = vec![tree.join("build/lib"), tree.join("dpdk/build/lib"), tree.join("build/libvfio-user/usr/local/lib")];
    let mut seen = std::collections::HashSet::new();
    let flags = String::from_utf8_lossy(&output.stdout).into_owned();
    for flag in flags.split_whitespace() {
        if let Some(dir) = flag.strip_prefix("-L") {
            dirs.push(PathBuf::from(dir));
        } else if flag.ends_with(".a")
            && let Some(dir) = Path::new(flag).parent()
        {
            dirs.push(dir.to_path_buf());
        }
    }
    dirs.retain(|dir| seen.insert(dir.clone()));
    for dir in &dirs {
        println!("cargo:rustc-link-search=native={}", dir.display());
    }

    let mut linked = std::collections::HashSet::new();
    for flag in flags.split_whitespace() {
        let name = if let Some(name) = flag.strip_prefix("-l:lib") {
            name.trim_end_matches(".a")
        } else if let Some(name) = flag.strip_prefix("-l") {
            name
        } else if let Some(file) = flag.strip_suffix(".a") {
            Path::new(file).file_name().and_then(|f| f.to_str()).map_or(file, |f| f.trim_start_matches("lib"))
        } else {
            continue;
        };
        if LEFT_OUT.contains(&name) || !linked.insert(name.to_string()) {
            continue;
        }
        let archive = dirs.iter().any(|dir| dir.starts_with(tree) && dir.join(format!("lib{name}.a")).exists());
        if name.starts_with("spdk_") || name.starts_with("rte_") {
            if !archive {
                fail(&format!("lib{name}.a is missing under {}; run `make spdk`", tree.display()));
            }
            println!("cargo:rustc-link-lib=static:+whole-archive,-bundle={name}");
        } else if archive {
            println!("cargo:rustc-link-lib=static:-bundle={name}");
        } else {
            println!("cargo:rustc-link-lib={name}");
        }
    }
}

fn fail(why: &str) -> ! {
    // cargo shows a build script's stderr when it fails; a panic would bury the sentence in a backtrace.
    eprintln!("penstock: {why}");
    println!("cargo:warning={why}");
    std::process::exit(1);
}
