//! The address guard: a webhook reaches public addresses, and what `SOAR_WEBHOOK_ALLOW` lists; nothing else.
//!
//! Whoever may set a webhook chooses where the backbone connects to, from inside the operator's network: server-side
//! request forgery. So the guard judges the very address that is dialled, after DNS, on every new connection; a name
//! that resolves differently a moment later gains nothing.
//!
//! "Public" follows IANA's special-purpose registries
//! (<https://www.iana.org/assignments/iana-ipv4-special-registry>,
//! <https://www.iana.org/assignments/iana-ipv6-special-registry>), and is stricter where that costs nobody anything. An
//! IPv6 address that carries an IPv4 address to be reached through a gateway (6to4, Teredo, NAT64, ISATAP) is public
//! only if what it carries is.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// IPv4 networks that are not public.
const NOT_PUBLIC_V4: [Ipv4Net; 17] = [
    v4([0, 0, 0, 0], 8),     // this network; 0.0.0.0 reaches the host itself (RFC 1122, section 3.2.1.3)
    v4([10, 0, 0, 0], 8),    // private (RFC 1918)
    v4([100, 64, 0, 0], 10), // carrier-grade NAT (RFC 6598); one cloud's metadata service
    v4([127, 0, 0, 0], 8),   // loopback
    v4([168, 63, 129, 16], 32), // Azure's platform service, answered inside its virtual machines only
    v4([169, 254, 0, 0], 16), // link-local (RFC 3927); most clouds' metadata service
    v4([172, 16, 0, 0], 12), // private (RFC 1918)
    v4([192, 0, 0, 0], 24),  // protocol assignments (RFC 6890); one cloud's metadata service
    v4([192, 0, 2, 0], 24),  // documentation (RFC 5737)
    v4([192, 88, 99, 0], 24), // 6to4 relays, withdrawn (RFC 7526)
    v4([192, 168, 0, 0], 16), // private (RFC 1918)
    v4([198, 18, 0, 0], 15), // benchmarking (RFC 2544)
    v4([198, 51, 100, 0], 24), // documentation
    v4([203, 0, 113, 0], 24), // documentation
    v4([224, 0, 0, 0], 4),   // multicast
    v4([240, 0, 0, 0], 4),   // reserved (RFC 1112)
    v4([255, 255, 255, 255], 32), // broadcast
];

/// The part of IPv6 that holds public addresses (RFC 4291, section 2.4): loopback, link-local, unique local (ULA),
/// multicast, v4-compatible and everything unassigned lie outside.
const GLOBAL_UNICAST: Ipv6Net = v6([0x2000, 0, 0, 0], 3);

/// Networks inside [`GLOBAL_UNICAST`] that are not public. Teredo, inside the first, is judged before.
const NOT_PUBLIC_V6: [Ipv6Net; 3] = [
    v6([0x2001, 0, 0, 0], 23),     // protocol assignments: benchmarking, ORCHID, … (RFC 2928)
    v6([0x2001, 0xdb8, 0, 0], 32), // documentation (RFC 3849)
    v6([0x3fff, 0, 0, 0], 20),     // documentation (RFC 9637)
];

/// 6to4 (RFC 3056): the IPv4 address follows the prefix.
const SIX_TO_FOUR: Ipv6Net = v6([0x2002, 0, 0, 0], 16);

/// Teredo (RFC 4380): the server's IPv4 address follows the prefix; the client's are the last 32 bits, inverted.
const TEREDO: Ipv6Net = v6([0x2001, 0, 0, 0], 32);

/// NAT64's well-known prefix (RFC 6052): the IPv4 address is the last 32 bits. NAT64's local-use prefix,
/// `64:ff9b:1::/48` (RFC 8215), is outside [`GLOBAL_UNICAST`] like the rest.
const NAT64: Ipv6Net = v6([0x64, 0xff9b, 0, 0], 96);

const fn v4(octets: [u8; 4], prefix: u8) -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::new(octets[0], octets[1], octets[2], octets[3]), prefix)
}

const fn v6(first: [u16; 4], prefix: u8) -> Ipv6Net {
    Ipv6Net::new_assert(Ipv6Addr::new(first[0], first[1], first[2], first[3], 0, 0, 0, 0), prefix)
}

/// Whether an address can be reached by everyone, as far as its form tells.
pub fn is_public(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(address) => is_public_v4(address),
        IpAddr::V6(address) => is_public_v6(address),
    }
}

fn is_public_v4(address: Ipv4Addr) -> bool {
    !NOT_PUBLIC_V4.iter().any(|net| net.contains(&address))
}

fn is_public_v6(address: Ipv6Addr) -> bool {
    let bits = address.to_bits();
    let low_v4 = Ipv4Addr::from_bits(bits as u32);
    if NAT64.contains(&address) {
        return is_public_v4(low_v4);
    }
    if SIX_TO_FOUR.contains(&address) {
        return is_public_v4(Ipv4Addr::from_bits((bits >> 80) as u32));
    }
    if TEREDO.contains(&address) {
        let server = Ipv4Addr::from_bits((bits >> 64) as u32);
        let client = Ipv4Addr::from_bits(!low_v4.to_bits());
        return is_public_v4(server) && is_public_v4(client);
    }
    // ISATAP (RFC 5214, section 6.1): an interface identifier of 0:5efe or 200:5efe, then the IPv4 address.
    let is_isatap = matches!((bits >> 32) as u32, 0x0000_5efe | 0x0200_5efe);
    if is_isatap && !is_public_v4(low_v4) {
        return false;
    }
    GLOBAL_UNICAST.contains(&address) && !NOT_PUBLIC_V6.iter().any(|net| net.contains(&address))
}

/// Which addresses webhooks may reach: public ones, and those that the operator listed.
#[derive(Debug, Clone, Default)]
pub struct Guard {
    allow: Vec<IpNet>,
}

impl Guard {
    /// A guard that admits these networks (`SOAR_WEBHOOK_ALLOW`) besides public addresses.
    pub fn new(allow: impl Into<Vec<IpNet>>) -> Self {
        Self { allow: allow.into() }
    }

    /// Whether the operator listed the address. A v4-mapped address (`::ffff:10.0.0.1`) is the IPv4 address that it
    /// maps, because dialling it reaches just that one.
    pub fn lists(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.allow.iter().any(|net| net.contains(&address))
    }

    /// Whether anything is listed at all.
    pub fn lists_any(&self) -> bool {
        !self.allow.is_empty()
    }

    /// Whether a webhook may connect to the address: over TLS to public and listed ones, in the clear to listed ones.
    pub fn admits(&self, address: IpAddr, https: bool) -> bool {
        self.lists(address) || (https && is_public(address))
    }
}

/// The address that a URL's host is, when it is one and not a name.
///
/// The URL parser has normalised it by then: `0x7f.1`, `2130706433` and `017700000001` all read `127.0.0.1`, and a
/// host that ends in a number is an address or refused (<https://url.spec.whatwg.org/#concept-ipv4-parser>).
pub fn literal(url: &reqwest::Url) -> Option<IpAddr> {
    let host = url.host_str()?;
    host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host).parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Hosts as they may be written in a webhook's URL, all of something that is not public.
    const REFUSED: &[&str] = &[
        // IPv4, plainly
        "0.0.0.0",
        "0.1.2.3",
        "10.0.0.1",
        "10.255.255.255",
        "100.64.0.1",
        "100.100.100.200",
        "100.127.255.255",
        "127.0.0.1",
        "127.255.255.254",
        "168.63.129.16",
        "169.254.0.1",
        "169.254.169.254",
        "172.16.0.1",
        "172.31.255.255",
        "192.0.0.192",
        "192.0.2.1",
        "192.88.99.1",
        "192.168.0.1",
        "198.18.0.1",
        "198.19.255.255",
        "198.51.100.7",
        "203.0.113.9",
        "224.0.0.1",
        "239.255.255.250",
        "240.0.0.1",
        "255.255.255.255",
        // The same in other spellings
        "127.1",
        "127.0.1",
        "0",
        "2130706433",
        "2852039166",
        "0x7f000001",
        "0x7F.0.0.1",
        "0x7f.1",
        "0xa9fea9fe",
        "0xa9.254.0251.254",
        "017700000001",
        "0177.0.0.1",
        "0251.0376.0251.0376",
        "00000177.0.0.01",
        "127.0.0.1.",
        "１２７.０.０.１",
        "127%2e0%2e0%2e1",
        "①②⑦.0.0.1",
        "127。0。0。1",
        // IPv6
        "[::]",
        "[::1]",
        "[0:0:0:0:0:0:0:1]",
        "[0000:0000:0000:0000:0000:0000:0000:0001]",
        "[::127.0.0.1]",
        "[::7f00:1]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[::FFFF:10.0.0.1]",
        "[::ffff:169.254.169.254]",
        "[0:0:0:0:0:ffff:a9fe:a9fe]",
        "[::ffff:0:127.0.0.1]",
        "[fe80::1]",
        "[febf::1]",
        "[fec0::1]",
        "[fc00::1]",
        "[fd00:ec2::254]",
        "[fd20:ce::254]",
        "[fdff::1]",
        "[ff02::1]",
        "[ff0e::1]",
        "[100::1]",
        "[2001:db8::1]",
        "[3fff::1]",
        "[3fff:fff::1]",
        "[2001:2::1]",
        "[2001:10::1]",
        "[2001:20::1]",
        "[5f00::1]",
        "[4000::1]",
        // IPv4 inside IPv6
        "[64:ff9b::127.0.0.1]",
        "[64:ff9b::a9fe:a9fe]",
        "[64:ff9b:1::a00:1]",
        "[64:ff9b:1::808:808]",
        "[2002:7f00:1::]",
        "[2002:a9fe:a9fe::1]",
        "[2002:c0a8:1::1]",
        "[2001:0:7f00:1::]",
        "[2001:0:808:808:0:0:80ff:fffe]",
        "[2a00:1450::5efe:10.0.0.1]",
        "[2a00:1450::200:5efe:7f00:1]",
    ];

    /// What no URL may hold as a host: the parser refuses it, so it is a 422 and never dialled.
    const UNREADABLE: &[&str] = &[
        "[fe80::1%25eth0]",
        "[fe80::1%eth0]",
        "[::1%lo]",
        "256.256.256.256",
        "1.2.3.4.5",
        "0x100000000",
        "127.0.0.08",
        "[::ffff:0x7f.0.0.1]",
        "[v1.a]",
        "%00",
        "a b",
    ];

    fn url(host: &str) -> Option<reqwest::Url> {
        reqwest::Url::parse(&format!("https://{host}/hook")).ok()
    }

    #[test]
    fn every_spelling_of_what_is_not_public_is_refused() {
        let guard = Guard::default();
        for host in REFUSED {
            let url = url(host).unwrap_or_else(|| panic!("{host} is a URL's host"));
            let address = literal(&url).unwrap_or_else(|| panic!("{host} is an address"));
            assert!(!guard.admits(address, true), "{host} = {address}");
            assert!(!guard.admits(address, false), "{host} = {address}");
        }
    }

    #[test]
    fn what_is_no_host_is_no_url() {
        for host in UNREADABLE {
            assert!(url(host).is_none(), "{host}");
        }
    }

    #[test]
    fn public_addresses_are_admitted_over_https_only() {
        let guard = Guard::default();
        for host in [
            "8.8.8.8",
            "1.1.1.1",
            "0x08080808",
            "100.63.255.255",
            "100.128.0.1",
            "172.15.0.1",
            "172.32.0.1",
            "192.0.1.1",
            "198.17.0.1",
            "198.20.0.1",
            "223.255.255.255",
            "[2606:4700::1111]",
            "[2a00:1450:4001::1]",
            "[::ffff:8.8.8.8]",
            "[64:ff9b::8.8.8.8]",
            "[2002:808:808::1]",
            "[2001:0:808:808:0:0:f7f7:f7f7]",
            "[2001:200::1]",
        ] {
            let address = url(host).as_ref().and_then(literal).unwrap_or_else(|| panic!("{host} is an address"));
            assert!(guard.admits(address, true), "{host}");
            assert!(!guard.admits(address, false), "{host}");
        }
    }

    #[test]
    fn listed_networks_are_admitted_and_nothing_beside_them() {
        let nets: Vec<IpNet> = ["127.0.0.0/8", "fd00::/8"].iter().map(|net| net.parse().expect("a CIDR")).collect();
        let guard = Guard::new(nets);
        for (address, admitted) in [
            ("127.0.0.1", true),
            ("::ffff:127.0.0.1", true),
            ("fd00::1", true),
            ("::1", false),
            ("10.0.0.1", false),
            ("64:ff9b::7f00:1", false),
            ("2002:7f00:1::", false),
        ] {
            let address: IpAddr = address.parse().expect("an address");
            assert_eq!(guard.admits(address, false), admitted, "{address}");
        }
    }

    #[test]
    fn names_are_not_literals() {
        for name in ["localhost", "localhost.", "example.com", "1.example.com", "0x7f.example"] {
            assert_eq!(url(name).as_ref().and_then(literal), None, "{name}");
        }
    }
}
