//! I/O: the network between peers, QUIC with both ends authenticated.
//!
//! Role: hops *wire*, *serve* and *reply*. Neighbours: the words below; `migrate` above. A [`Peer`]'s regions are stores that a pager reads; a [`Server`] reads
//! any store. Invariants: no bytes of a program leave or enter before both ends have proved a key that the other end let in (S7);
//! everything runs on a service's thread (S2).

pub(crate) mod codec;
mod feed;
mod identity;
mod lane;
mod peer;
mod pull;
mod remote;
mod serve;
mod server;
mod shape;
mod shaped;
mod shaper;
mod socket;
mod stream;
mod tls;
mod transport;
pub(crate) mod wire;

pub(crate) use feed::{Fed, FeedReader};
pub use identity::{Identity, IdentityError, PeerId, PeerIdError};
pub use peer::{Peer, PeerBuilder};
pub use remote::RemoteStore;
pub(crate) use serve::Feed;
pub(crate) use server::{Extension, TakeStream};
pub use server::{Grant, Server, ServerBuilder};
pub use shape::{LinkControl, LinkShape, LinkShapeError};
pub(crate) use stream::{FrameReader, FrameWriter, StreamError};
pub use tls::Trust;
pub use transport::TransportOptions;

use crate::StoreError;
use wire::ErrorCode;

/// What a FAILED frame means to whoever asked.
fn refusal(code: ErrorCode, message: &str) -> StoreError {
    match code {
        ErrorCode::ReadOnly => StoreError::ReadOnly,
        code => StoreError::Refused { code: code.into(), message: message.to_owned() },
    }
}
