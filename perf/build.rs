//! Links SPDK's raid module into this one program: raid1 is the peer of benchmarks 1, 2 and 3. The daemon does without it, since it reads every new
//! device in search of superblocks of its own. Where SPDK is, the build script of `sys/ffi` has told the linker already.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    // Its constructors register the module, its levels and its calls, so the linker must take it whole.
    for argument in ["-Wl,--whole-archive", "-l:libspdk_bdev_raid.a", "-Wl,--no-whole-archive"] {
        println!("cargo::rustc-link-arg-bin=penstock-perf={argument}");
    }
}
