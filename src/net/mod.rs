//! I/O: QUIC between hosts.
//!
//! Role: everything that speaks to a peer. Neighbours: `region`, `mount` and `migrate` use it. Invariants: only [`wire`] knows the
//! layout of a frame.

pub(crate) mod codec;
pub(crate) mod wire;
