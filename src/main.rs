//! The `tidegate` binary: the gateway, and the operator's commands. See [`tidegate::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    tidegate::cli::main()
}
