//! The layers as clients meet them: a real listener and the whole stack, over loopback connections.

pub mod support;

mod deadline;
mod drain;
mod log;
mod observe;
mod pace;
mod shed;
