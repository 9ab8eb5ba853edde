//! The limit on open files (getrlimit(2)), of which each connection is one.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// What a gateway has open besides connections, and room for more: databases, sockets, files of certificates.
const OTHERS: u64 = 256;

/// Raises the limit as far as a program may do that by itself, and returns it. The low one that programs start with is there
/// for the sake of select(2), which nothing here uses.
pub fn raise_limit() -> u64 {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let raised = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).is_ok();
    // None: there is no limit.
    (if raised { maximum } else { current }).unwrap_or(u64::MAX)
}

/// [`raise_limit`], and a word in the log when so many connections don't fit.
pub fn raise_limit_for(connections_max: usize) {
    let limit = raise_limit();
    if limit < connections_max as u64 + OTHERS {
        tracing::warn!(
            limit,
            connections_max,
            "gateway.files_limited: the limit on open files is too low for grpc.connections_max; further connections wait until others end"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_what_the_system_allows() {
        let limit = raise_limit();
        let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
        assert_eq!((current, limit), (maximum, maximum.unwrap_or(u64::MAX)));
    }
}
