//! What a machine's network card may reach: the VMM hands every frame the guest sends to this thread, which gives back
//! those that go to the public internet or to the name server, and answers the others "administratively prohibited".
//!
//! The VMM's user-mode network opens the host's own sockets, so without this a guest would reach whatever listens on the
//! host's loopback and in its network. Frames towards the guest do not come by here: they answer what was let out.
//!
//! Frames are a guest's bytes: of each only the Ethernet, IPv4 and ports' fields are read, at fixed places and after the
//! length was checked; nothing is kept of one when the next is read. Form of the three streams: QEMU's net/socket.c, a
//! length (u32, big endian) before each frame. This module must know nothing of machines' names or of policies.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// Longest frame the VMM sends (NET_BUFSIZE of QEMU's include/net/net.h).
const FRAME_MAX: usize = 4096 + 65536;
const HEAD: usize = 4;
const ETHERNET: usize = 14;
const STACK_BYTES: usize = 64 << 10;
/// The card's own network: this many bits of `GATEWAY`; the VMM's defaults (docs: QEMU, "Network options", user).
const GATEWAY: [u8; 4] = [10, 0, 2, 2];
const NAME_SERVER: [u8; 4] = [10, 0, 2, 3];
const DNS: u16 = 53;
const GATEWAY_MAC: [u8; 6] = [0x52, 0x55, 10, 0, 2, 2];
/// How long what was found of the host's own addresses is believed.
const OWN_FRESH: Duration = Duration::from_secs(2);

/// IPv4 ranges that are not the public internet: IANA's special-purpose registry (RFC 6890 and its updates), multicast,
/// and class E with the broadcast address. The broker's policy has the same list.
const SPECIAL: [Net; 15] = [
    Net::of([0, 0, 0, 0], 8),
    Net::of([10, 0, 0, 0], 8),
    Net::of([100, 64, 0, 0], 10),
    Net::of([127, 0, 0, 0], 8),
    Net::of([169, 254, 0, 0], 16),
    Net::of([172, 16, 0, 0], 12),
    Net::of([192, 0, 0, 0], 24),
    Net::of([192, 0, 2, 0], 24),
    Net::of([192, 88, 99, 0], 24),
    Net::of([192, 168, 0, 0], 16),
    Net::of([198, 18, 0, 0], 15),
    Net::of([198, 51, 100, 0], 24),
    Net::of([203, 0, 113, 0], 24),
    Net::of([224, 0, 0, 0], 4),
    Net::of([240, 0, 0, 0], 4),
];

/// An IPv4 network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Net {
    address: u32,
    mask: u32,
}

impl Net {
    const fn of(address: [u8; 4], bits: u32) -> Net {
        Net {
            address: u32::from_be_bytes(address),
            mask: u32::MAX << (32 - bits),
        }
    }

    fn has(self, address: u32) -> bool {
        (address ^ self.address) & self.mask == 0
    }
}

/// What becomes of a frame.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    Pass,
    /// Not passed, and nobody is told: what is no IPv4, or cannot be answered.
    Drop,
    /// Not passed; the guest is sent this frame.
    Refuse(Vec<u8>),
}

/// Judge a frame that the guest sent. `own`: the networks that the host itself is in.
pub fn judge(frame: &[u8], own: &[Net]) -> Verdict {
    match frame.get(12..14) {
        Some([0x08, 0x06]) => return Verdict::Pass, // ARP: asks for the gateway, stays inside the VMM
        Some([0x08, 0x00]) => {}
        _ => return Verdict::Drop,
    }
    let Some(packet) = Packet::of(&frame[ETHERNET..]) else {
        return Verdict::Drop;
    };
    let name_server = packet.to == u32::from_be_bytes(NAME_SERVER);
    let allowed = if name_server {
        !packet.fragment && packet.port == Some(DNS)
    } else {
        !SPECIAL.iter().chain(own).any(|net| net.has(packet.to))
    };
    if allowed {
        return Verdict::Pass;
    }
    refusal(frame, &packet).map_or(Verdict::Drop, Verdict::Refuse)
}

/// The fields of an IPv4 packet that are looked at.
struct Packet {
    header: usize,
    fragment: bool,
    /// Destination port, of a TCP or UDP packet that is no later fragment.
    port: Option<u16>,
    from: [u8; 4],
    to: u32,
}

impl Packet {
    fn of(bytes: &[u8]) -> Option<Packet> {
        let head: &[u8; 20] = bytes.first_chunk()?;
        let header = usize::from(head[0] & 0x0f) * 4;
        if head[0] >> 4 != 4 || header < 20 || bytes.len() < header {
            return None;
        }
        let part = u16::from_be_bytes([head[6], head[7]]) & 0x3fff; // "more fragments", and the offset
        let ports: Option<&[u8; 4]> = bytes[header..].first_chunk();
        let port = match (head[9], part & 0x1fff, ports) {
            (6 | 17, 0, Some(ports)) => Some(u16::from_be_bytes([ports[2], ports[3]])),
            _ => None,
        };
        Some(Packet {
            header,
            fragment: part != 0,
            port,
            from: [head[12], head[13], head[14], head[15]],
            to: u32::from_be_bytes([head[16], head[17], head[18], head[19]]),
        })
    }
}

/// ICMP "communication administratively prohibited" (RFC 1812, 5.2.7.1): the caller's `connect` fails at once. Only for TCP
/// and UDP, whose first eight bytes the message quotes.
fn refusal(frame: &[u8], packet: &Packet) -> Option<Vec<u8>> {
    packet.port?;
    let quoted = frame.get(ETHERNET..ETHERNET + packet.header + 8)?;
    let mut icmp = vec![3, 13, 0, 0, 0, 0, 0, 0];
    icmp.extend_from_slice(quoted);
    let sum = checksum(&icmp);
    icmp[2..4].copy_from_slice(&sum.to_be_bytes());
    let total = u16::try_from(20 + icmp.len()).ok()?;
    let mut ip = [0u8; 20];
    ip[0] = 0x45;
    ip[2..4].copy_from_slice(&total.to_be_bytes());
    (ip[8], ip[9]) = (64, 1);
    ip[12..16].copy_from_slice(&GATEWAY);
    ip[16..20].copy_from_slice(&packet.from);
    let sum = checksum(&ip);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    let mut out = Vec::with_capacity(ETHERNET + ip.len() + icmp.len());
    out.extend_from_slice(&frame[6..12]);
    out.extend_from_slice(&GATEWAY_MAC);
    out.extend_from_slice(&[0x08, 0x00]);
    out.extend_from_slice(&ip);
    out.extend_from_slice(&icmp);
    Some(out)
}

/// The internet checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = 0;
    for pair in bytes.chunks(2) {
        sum += u32::from(u16::from_be_bytes([
            pair[0],
            pair.get(1).copied().unwrap_or(0),
        ]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// The networks this host is in now, each of its addresses with its mask: neither it nor its neighbours are public to a
/// machine, whatever their addresses are.
fn own_networks() -> Vec<Net> {
    let mut out = Vec::new();
    let mut list: *mut libc::ifaddrs = std::ptr::null_mut();
    // SAFETY: `list` is ours; every entry stays valid until it is freed, and an AF_INET address is a sockaddr_in.
    unsafe {
        if libc::getifaddrs(&raw mut list) != 0 {
            return out;
        }
        let mut at = list;
        while let Some(entry) = at.as_ref() {
            if let (Some(address), Some(mask)) = (inet(entry.ifa_addr), inet(entry.ifa_netmask)) {
                out.push(Net { address, mask });
            }
            at = entry.ifa_next;
        }
        libc::freeifaddrs(list);
    }
    out
}

unsafe fn inet(address: *const libc::sockaddr) -> Option<u32> {
    let family = address.as_ref()?.sa_family;
    (i32::from(family) == libc::AF_INET).then(|| {
        let address: libc::sockaddr_in = std::ptr::read_unaligned(address.cast());
        u32::from_be(address.sin_addr.s_addr)
    })
}

/// The VMM's ends of the three streams: what the guest sent, what of it goes on, and answers to the guest.
pub struct Ends {
    pub sent: OwnedFd,
    pub passed: OwnedFd,
    pub back: OwnedFd,
}

/// Our ends, until the thread has them.
pub struct Filter {
    sent: UnixStream,
    passed: Sink,
    back: Sink,
}

impl Filter {
    pub fn new() -> io::Result<(Filter, Ends)> {
        let (sent, theirs_sent) = UnixStream::pair()?;
        let (passed, theirs_passed) = UnixStream::pair()?;
        let (back, theirs_back) = UnixStream::pair()?;
        let filter = Filter {
            sent,
            passed: Sink::new(passed)?,
            back: Sink::new(back)?,
        };
        let ends = Ends {
            sent: theirs_sent.into(),
            passed: theirs_passed.into(),
            back: theirs_back.into(),
        };
        Ok((filter, ends))
    }

    /// Work in a thread of its own until the VMM is gone. To be called after the VMM was forked.
    pub fn start(self) -> io::Result<()> {
        let thread = std::thread::Builder::new().stack_size(STACK_BYTES);
        thread.spawn(move || self.run()).map(drop)
    }

    /// Ends with the VMM, or with a stream that makes no sense: the card is then cut off, which is the safe side.
    fn run(mut self) {
        let mut buffer = vec![0u8; HEAD + FRAME_MAX];
        let (mut own, mut asked) = (own_networks(), Instant::now());
        loop {
            if self.sent.read_exact(&mut buffer[..HEAD]).is_err() {
                return;
            }
            let length = u32::from_be_bytes([buffer[0], buffer[1], buffer[2], buffer[3]]) as usize;
            let Some(frame) = buffer.get_mut(HEAD..HEAD + length) else {
                return;
            };
            if self.sent.read_exact(frame).is_err() {
                return;
            }
            if asked.elapsed() > OWN_FRESH {
                (own, asked) = (own_networks(), Instant::now());
            }
            match judge(frame, &own) {
                Verdict::Pass => self.passed.send(&buffer[..HEAD + length]),
                Verdict::Refuse(answer) => {
                    let mut message = (answer.len() as u32).to_be_bytes().to_vec();
                    message.extend_from_slice(&answer);
                    self.back.send(&message);
                }
                Verdict::Drop => {}
            }
        }
    }
}

/// A stream to the VMM that is never waited for: while the VMM writes to us it reads nothing, so waiting would hold both
/// for ever. A frame that finds no room is lost, as on any wire; one that found room for its beginning is finished first.
struct Sink {
    stream: UnixStream,
    rest: Vec<u8>,
}

impl Sink {
    fn new(stream: UnixStream) -> io::Result<Sink> {
        stream.set_nonblocking(true)?;
        Ok(Sink {
            stream,
            rest: Vec::new(),
        })
    }

    fn send(&mut self, message: &[u8]) {
        let rest = std::mem::take(&mut self.rest);
        let gone = self.write(&rest);
        if gone < rest.len() {
            self.rest = rest[gone..].to_vec();
            return;
        }
        let gone = self.write(message);
        if gone > 0 {
            self.rest = message[gone..].to_vec(); // goes with the next frame: who sent this one sends it again
        }
    }

    fn write(&mut self, bytes: &[u8]) -> usize {
        let mut gone = 0;
        while gone < bytes.len() {
            match self.stream.write(&bytes[gone..]) {
                Ok(count) => gone += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => break, // full, or the VMM has gone: reading says so
            }
        }
        gone
    }
}

impl Ends {
    pub fn raw(&self) -> [i32; 3] {
        [
            self.sent.as_raw_fd(),
            self.passed.as_raw_fd(),
            self.back.as_raw_fd(),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A frame with a TCP packet (six) or a UDP one (17) to `to`.
    fn frame(protocol: u8, to: [u8; 4], port: u16) -> Vec<u8> {
        let mut out = vec![
            0x52, 0x55, 10, 0, 2, 2, 0x52, 0x54, 0, 0x12, 0x34, 0x56, 8, 0,
        ];
        let mut ip = vec![
            0x45, 0, 0, 40, 0, 1, 0x40, 0, 64, protocol, 0, 0, 10, 0, 2, 15,
        ];
        ip.extend_from_slice(&to);
        ip.extend_from_slice(&40000u16.to_be_bytes());
        ip.extend_from_slice(&port.to_be_bytes());
        ip.extend_from_slice(&[0; 16]);
        out.extend_from_slice(&ip);
        out
    }

    #[test]
    fn the_public_internet_passes_and_nothing_else() {
        let own = [Net::of([93, 184, 216, 0], 24)];
        assert_eq!(judge(&frame(6, [1, 1, 1, 1], 443), &own), Verdict::Pass);
        assert_eq!(judge(&frame(17, [8, 8, 8, 8], 53), &own), Verdict::Pass);
        for to in [
            [10, 0, 2, 2],
            [10, 0, 2, 4],
            [127, 0, 0, 1],
            [127, 9, 9, 9],
            [0, 0, 0, 0],
            [169, 254, 169, 254],
            [172, 31, 0, 1],
            [192, 168, 1, 1],
            [100, 100, 0, 1],
            [224, 0, 0, 251],
            [255, 255, 255, 255],
            [93, 184, 216, 34],
        ] {
            for protocol in [6, 17] {
                assert!(
                    matches!(judge(&frame(protocol, to, 80), &own), Verdict::Refuse(_)),
                    "{to:?}"
                );
            }
            assert_eq!(judge(&frame(1, to, 0), &own), Verdict::Drop);
        }
    }

    #[test]
    fn the_name_server_is_there_for_names_alone() {
        assert_eq!(judge(&frame(17, NAME_SERVER, 53), &[]), Verdict::Pass);
        assert_eq!(judge(&frame(6, NAME_SERVER, 53), &[]), Verdict::Pass);
        assert!(matches!(
            judge(&frame(6, NAME_SERVER, 5432), &[]),
            Verdict::Refuse(_)
        ));
        assert_eq!(judge(&frame(1, NAME_SERVER, 53), &[]), Verdict::Drop);
        let mut fragment = frame(17, NAME_SERVER, 53);
        fragment[ETHERNET + 6] = 0x20;
        assert!(matches!(judge(&fragment, &[]), Verdict::Refuse(_)));
        fragment[ETHERNET + 7] = 1; // a later one: what stands where ports were is data
        assert_eq!(judge(&fragment, &[]), Verdict::Drop);
    }

    #[test]
    fn what_is_no_ipv4_is_dropped_and_arp_passes() {
        let mut arp = frame(6, [1, 1, 1, 1], 80);
        arp[13] = 6;
        assert_eq!(judge(&arp, &[]), Verdict::Pass);
        for kind in [[0x86, 0xdd], [0x81, 0x00], [0x88, 0xf8]] {
            let mut other = frame(6, [1, 1, 1, 1], 80);
            other[12..14].copy_from_slice(&kind);
            assert_eq!(judge(&other, &[]), Verdict::Drop);
        }
        let whole = frame(6, [1, 1, 1, 1], 80);
        for length in 0..ETHERNET + 20 {
            assert_eq!(judge(&whole[..length], &[]), Verdict::Drop, "{length}");
        }
        for first in [0x65, 0x44, 0x4f] {
            let mut odd = whole.clone();
            odd[ETHERNET] = first;
            odd.truncate(ETHERNET + 40);
            assert_eq!(judge(&odd, &[]), Verdict::Drop, "{first:#x}");
        }
    }

    #[test]
    fn no_bytes_are_too_odd_to_be_judged() {
        let mut seed = 0x2545_f491_4f6c_dd1d_u64;
        for _ in 0..20_000 {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            let mut bytes = frame(
                (seed >> 60) as u8 | 1,
                seed.to_be_bytes()[..4].try_into().unwrap(),
                53,
            );
            let at = (seed as usize >> 8) % bytes.len();
            bytes[at] = seed as u8;
            bytes.truncate((seed as usize >> 16) % (bytes.len() + 1));
            if let Verdict::Refuse(answer) = judge(&bytes, &[]) {
                assert!(answer.len() >= ETHERNET + 20 + 8 + 28);
            }
        }
    }

    #[test]
    fn a_refusal_says_so_to_who_asked() {
        let asked = frame(6, [127, 0, 0, 1], 80);
        let Verdict::Refuse(answer) = judge(&asked, &[]) else {
            panic!("not refused")
        };
        assert_eq!(answer[..6], asked[6..12]);
        let (ip, icmp) = answer[ETHERNET..].split_at(20);
        assert_eq!(checksum(ip), 0);
        assert_eq!(checksum(icmp), 0);
        assert_eq!(
            usize::from(u16::from_be_bytes([ip[2], ip[3]])),
            ip.len() + icmp.len()
        );
        assert_eq!(
            (&ip[12..16], &ip[16..20]),
            (&GATEWAY[..], &[10, 0, 2, 15][..])
        );
        assert_eq!(icmp[..2], [3, 13]);
        assert_eq!(icmp[8..], asked[ETHERNET..ETHERNET + 28]);
    }

    #[test]
    fn frames_are_moved_until_the_vmm_is_gone() {
        let (filter, ends) = Filter::new().unwrap();
        let thread = std::thread::spawn(move || filter.run());
        let mut sent = UnixStream::from(ends.sent);
        let (mut passed, mut back) = (UnixStream::from(ends.passed), UnixStream::from(ends.back));
        for message in [frame(6, [127, 0, 0, 1], 80), frame(6, [1, 1, 1, 1], 80)] {
            sent.write_all(&(message.len() as u32).to_be_bytes())
                .unwrap();
            sent.write_all(&message).unwrap();
        }
        let mut got = vec![0; HEAD + 54];
        passed.read_exact(&mut got).unwrap();
        assert_eq!(got[HEAD..], frame(6, [1, 1, 1, 1], 80));
        let mut answer = vec![0; HEAD + ETHERNET + 20 + 8 + 28];
        back.read_exact(&mut answer).unwrap();
        drop(sent);
        thread.join().unwrap();
    }

    #[test]
    fn a_vmm_that_reads_nothing_holds_nobody_up() {
        let (filter, ends) = Filter::new().unwrap();
        let thread = std::thread::spawn(move || filter.run());
        let mut sent = UnixStream::from(ends.sent);
        let message = frame(6, [1, 1, 1, 1], 80);
        for _ in 0..20_000 {
            sent.write_all(&(message.len() as u32).to_be_bytes())
                .unwrap();
            sent.write_all(&message).unwrap();
        }
        drop(sent);
        thread.join().unwrap();
        let mut all = Vec::new();
        UnixStream::from(ends.passed).read_to_end(&mut all).unwrap();
        let whole = HEAD + message.len();
        assert!(all
            .chunks_exact(whole)
            .all(|one| one[HEAD..] == message[..]));
    }

    #[test]
    fn the_hosts_own_networks_hold_its_loopback() {
        assert!(own_networks().iter().any(|net| net.has(0x7f00_0001)));
    }
}
