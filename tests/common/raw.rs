//! The two ends of a handover by hand: a test can stop at any step, ask again, or say what pageferry's own ends never would.

#![allow(dead_code, reason = "each test binary uses its own part")]

use crate::net::{
    Asked, DATA, FEED, Got, HELLO, Liar, OPENED, RawClient, TAKE, WELCOME, credit, feed, frame, hello, lane, open, read, soon,
};
use pageferry::Identity;
use std::{collections::BTreeSet, future::Future, net::SocketAddr, sync::Arc};
use tokio::sync::mpsc;

pub const OFFER: u8 = 0x31;
pub const STATE: u8 = 0x32;
pub const READY: u8 = 0x33;
pub const COMMIT: u8 = 0x34;
pub const RESUMED: u8 = 0x35;
pub const COMPLETE: u8 = 0x36;
pub const RELEASED: u8 = 0x37;
pub const ABORT: u8 = 0x38;
pub const MAPPED: u8 = 0x39;
pub const PREPARE: u8 = 0x3a;
pub const LACKS: u8 = 0x3c;
pub const POINT: u8 = 0x3e;
pub const MARK: u8 = 0x3f;
pub const KEPT: u8 = 0x40;
pub const PROMOTE: u8 = 0x41;
pub const DEPOSE: u8 = 0x42;

/// Codes of an ABORT.
pub const ABORTED: u16 = 9;
pub const NOT_OWNER: u16 = 10;

/// One end of a handover's stream.
pub struct Handover {
    send: quinn::SendStream,
    receive: quinn::RecvStream,
    pub session: u128,
    /// Of the last frame that had one.
    pub epoch: u64,
    /// Of a destination: with what it listens for pages.
    connection: Option<quinn::Connection>,
    names: Vec<String>,
    /// What MAPPED says of the regions, if not that they were mapped for the attempt.
    pub mapped_since: Option<u64>,
    /// On each feed.
    pub credit_bytes: u64,
    pub feeds: Vec<(quinn::SendStream, quinn::RecvStream)>,
}

/// No strategy but post-copy, and no limits.
pub const POST_COPY: [u8; 24] = [0; 24];
/// Ten rounds at most.
pub const HYBRID: [u8; 24] = [2, 0, 10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

fn names(offer: &[u8]) -> Vec<String> {
    let (count, mut rest) = (u16::from_le_bytes([offer[32], offer[33]]), &offer[34..]);
    let mut next = || {
        let len = usize::from(rest[0]);
        let name = String::from_utf8(rest[1..1 + len].to_vec()).unwrap();
        rest = &rest[1 + len + 17..];
        name
    };
    (0..count).map(|_| next()).collect()
}

impl Handover {
    fn new(send: quinn::SendStream, receive: quinn::RecvStream, session: u128, connection: Option<quinn::Connection>) -> Handover {
        Handover {
            send,
            receive,
            session,
            epoch: 0,
            connection,
            names: Vec::new(),
            mapped_since: None,
            credit_bytes: 0,
            feeds: Vec::new(),
        }
    }

    pub async fn say_with(&mut self, kind: u8, rest: &[u8]) {
        let turn = [&self.session.to_le_bytes()[..], &self.epoch.to_le_bytes()].concat();
        // The other end may be gone: the test looks at what comes of it.
        let _ = self.send.write_all(&frame(kind, 0, &[&turn, rest].concat())).await;
    }

    /// Sends a frame of session and epoch. A destination listens for the pages of all regions before it says MAPPED.
    pub async fn say(&mut self, kind: u8) {
        if kind == MAPPED
            && let Some(connection) = self.connection.clone()
        {
            self.feeds.clear();
            for name in self.names.clone() {
                self.listen(&connection, &name).await;
            }
        }
        // Mapped for this attempt.
        let since = self.mapped_since.unwrap_or(self.epoch).to_le_bytes();
        let rest: &[u8] = if kind == MAPPED { &since } else { &[] };
        self.say_with(kind, rest).await;
    }

    async fn listen(&mut self, connection: &quinn::Connection, name: &str) {
        // Whatever is refused, or lost, the test looks at what comes of it.
        let Ok((mut send, mut receive)) = connection.open_bi().await else { return };
        let _ = send.write_all(&[hello(1), open(name)].concat()).await;
        let _ = send.finish();
        let (first, second) = (Got::read(&mut receive).await, Got::read(&mut receive).await);
        let (Some(WELCOME), Some(OPENED)) = (first.map(|got| got.kind), second.as_ref().map(|got| got.kind)) else { return };
        let region = second.unwrap().u32_at(0);
        let Ok((mut send, receive)) = connection.open_bi().await else { return };
        let _ = send.write_all(&feed(self.session, self.epoch, region, self.credit_bytes)).await;
        self.feeds.push((send, receive));
    }

    pub async fn hear(&mut self) -> Option<(u8, Vec<u8>)> {
        let Got { kind, payload, .. } = soon("a frame of the handover", Got::read(&mut self.receive)).await?;
        if kind != STATE && kind != TAKE {
            self.epoch = u64::from_le_bytes(payload[16..24].try_into().unwrap());
        }
        if kind == OFFER {
            self.names = names(&payload);
        }
        Some((kind, payload))
    }

    pub async fn expect(&mut self, kind: u8) -> Vec<u8> {
        let (got, payload) = self.hear().await.unwrap_or_else(|| panic!("the stream ended instead of frame {kind:#x}"));
        assert_eq!(got, kind, "{got:#x} came instead of {kind:#x}: {:?}", String::from_utf8_lossy(&payload));
        payload
    }

    /// The code and the text of the ABORT that comes next.
    pub async fn aborted(&mut self) -> (u16, String) {
        let payload = self.expect(ABORT).await;
        (u16::from_le_bytes([payload[24], payload[25]]), String::from_utf8(payload[28..].to_vec()).unwrap())
    }

    /// Reads PREPARE and its state.
    pub async fn prepared(&mut self) -> Vec<u8> {
        let prepare = self.expect(PREPARE).await;
        let len = u64::from_le_bytes(prepare[24..32].try_into().unwrap()) as usize;
        let mut state = Vec::new();
        while state.len() < len {
            state.extend(self.expect(STATE).await);
        }
        state
    }

    /// As a destination, from TAKE to the step named; the last frame of the step was sent or read.
    pub async fn up_to(&mut self, last: u8) {
        for step in [OFFER, MAPPED, PREPARE, READY, COMMIT, RESUMED, COMPLETE, RELEASED] {
            match step {
                PREPARE => drop(self.prepared().await),
                OFFER | COMMIT | RELEASED => drop(self.expect(step).await),
                _ => self.say(step).await,
            }
            if step == last {
                return;
            }
        }
    }

    /// The pages that come on the first feed up to LACKS, each acknowledged as it comes.
    pub async fn fed(&mut self) -> BTreeSet<u64> {
        let (send, receive) = &mut self.feeds[0];
        let (mut pages, mut used) = (BTreeSet::new(), 0);
        loop {
            let got = soon("a page or LACKS", Got::read(receive)).await.expect("the feed goes on");
            if got.kind == LACKS {
                return pages;
            }
            pages.extend(got.extent().pages());
            used += got.payload.len() as u64 - 16;
            send.write_all(&credit(self.credit_bytes + used)).await.unwrap();
        }
    }

    pub async fn offer(&mut self, epoch: u64, name: &str, size_bytes: u64, address: u64) {
        self.epoch = epoch;
        let region = [&[name.len() as u8], name.as_bytes(), &[12], &size_bytes.to_le_bytes(), &address.to_le_bytes()].concat();
        self.say_with(OFFER, &[&0u64.to_le_bytes()[..], &1u16.to_le_bytes(), &region].concat()).await;
    }

    /// Says that a point is sent, with a state of one byte: its number.
    pub async fn point(&mut self, number: u64) {
        self.announce(number, 1).await;
        self.state(&[number as u8]).await;
    }

    /// Says that a point is sent, whose state is to follow.
    pub async fn announce(&mut self, number: u64, state_bytes: u64) {
        self.say_with(POINT, &[number.to_le_bytes(), [0; 8], state_bytes.to_le_bytes()].concat()).await;
    }

    pub async fn state(&mut self, piece: &[u8]) {
        let _ = self.send.write_all(&frame(STATE, 0, piece)).await;
    }

    pub async fn prepare(&mut self) {
        self.say_with(PREPARE, &0u64.to_le_bytes()).await;
    }

    pub async fn abort(&mut self, reason: &str) {
        let length = (reason.len() as u16).to_le_bytes();
        self.say_with(ABORT, &[&ABORTED.to_le_bytes()[..], &length, reason.as_bytes()].concat()).await;
    }
}

/// A destination's connection.
pub struct RawDestination {
    pub client: RawClient,
}

impl RawDestination {
    pub async fn connect(address: SocketAddr, identity: &Identity) -> RawDestination {
        RawDestination { client: soon("connecting", RawClient::connect(address, Some(identity))).await.unwrap() }
    }

    /// A stream on which TAKE was sent.
    pub async fn take(&self, session: u128) -> Handover {
        self.take_by(session, &POST_COPY).await
    }

    pub async fn take_by(&self, session: u128, plan: &[u8; 24]) -> Handover {
        let take = frame(TAKE, 0, &[&session.to_le_bytes()[..], plan].concat());
        let (send, receive) = self.client.stream(&take).await;
        Handover::new(send, receive, session, Some(self.client.connection.clone()))
    }

    /// The bytes of a region.
    pub async fn read(&self, name: &str, pages: u32) -> Vec<u8> {
        let region = self.client.open(name).await;
        let answers = self.client.say(&[lane(2), read(region, 0, pages)].concat()).await;
        let mut bytes = Vec::new();
        for answer in answers {
            assert_eq!(answer.kind, DATA, "{answer:?}");
            // Raw, or zeros that travel as nothing: what is demanded is not compressed.
            let (content, len) = (&answer.payload[16..], answer.extent().count() as usize * 4096);
            assert!(content.is_empty() || content.len() == len);
            bytes.extend_from_slice(content);
            bytes.resize(bytes.len() + len - content.len(), 0);
        }
        assert_eq!(bytes.len(), pages as usize * 4096);
        bytes
    }
}

/// A source's port. It opens every region that it is asked for, with the size given; all else is the test's.
pub struct RawSource {
    pub address: SocketAddr,
    liar: Option<Liar>,
    takes: mpsc::UnboundedReceiver<Handover>,
}

impl RawSource {
    pub fn listen(identity: &Identity, pages: u64) -> RawSource {
        RawSource::that_lacks(identity, pages, vec![(0, pages)])
    }

    /// What it says is lacking may be a lie.
    pub fn that_lacks(identity: &Identity, pages: u64, lacking: Vec<(u64, u64)>) -> RawSource {
        RawSource::with_feeds(identity, pages, move |mut asked| {
            let mut payload = [&(lacking.len() as u32).to_le_bytes()[..], &[0]].concat();
            for (first, count) in &lacking {
                payload.extend([first.to_le_bytes(), count.to_le_bytes()].concat());
            }
            // Nothing is sent unasked.
            async move {
                asked.say(&frame(LACKS, 0, &payload)).await;
                let _ = asked.send.finish();
            }
        })
    }

    /// What it says on a feed is the test's.
    pub fn with_feeds<F>(identity: &Identity, pages: u64, feed: impl Fn(Asked) -> F + Send + Sync + 'static) -> RawSource
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let (taken, takes) = mpsc::unbounded_channel();
        let feed = Arc::new(feed);
        let liar = Liar::start(identity, move |asked: Asked| {
            let (taken, feed) = (taken.clone(), feed.clone());
            async move {
                match asked.first.kind {
                    HELLO => asked.control(pages).await,
                    TAKE => {
                        let session = u128::from_le_bytes(asked.first.payload[..16].try_into().unwrap());
                        let _ = taken.send(Handover::new(asked.send, asked.receive, session, None));
                    }
                    FEED => feed(asked).await,
                    _ => {}
                }
            }
        });
        RawSource { address: liar.address, liar: Some(liar), takes }
    }

    /// The next stream on which a session was asked for.
    pub async fn taken(&mut self) -> Handover {
        soon("TAKE", self.takes.recv()).await.unwrap()
    }

    /// Ends all connections, and nobody answers new ones.
    pub fn close(&mut self) {
        self.liar = None;
    }
}
