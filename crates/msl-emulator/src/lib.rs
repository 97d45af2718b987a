//! Runs Metal compute kernels on a CPU.
