/* What bindgen reads. build.rs says which of it becomes Rust. */
#include "shim.h"
