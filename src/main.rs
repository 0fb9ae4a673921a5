//! The command line. Each command is a file in `cli/`.

use std::process::ExitCode;

fn main() -> ExitCode {
    noblink::cli::main()
}
