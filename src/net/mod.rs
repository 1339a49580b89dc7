//! I/O: the network between peers, QUIC with both ends authenticated.
//!
//! Role: names the modules of this layer and what of them is public. Neighbours: the words below; handles and jobs above.
//! Invariants: no bytes of a program leave or enter before both ends have proved a key that the other end let in.

mod identity;
#[cfg_attr(not(test), expect(dead_code, reason = "the endpoint that uses these configurations comes with the next modules"))]
mod tls;

pub use identity::{Identity, IdentityError, PeerId, PeerIdError};
pub use tls::Trust;
