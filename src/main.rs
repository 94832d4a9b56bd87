//! The `backbone` program.

fn main() {}
