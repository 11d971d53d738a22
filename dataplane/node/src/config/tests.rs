//! Configuration: defaults, and errors that name file, line and what would be right.

use std::path::Path;

use proptest::prelude::*;

use super::*;

fn read(text: &str) -> Result<Config, ConfigError> {
    let mut config = Config::default();
    file::apply(&mut config, Path::new("/etc/p.toml"), text)?;
    config.settle()?;
    Ok(config)
}

#[test]
fn file_with_all_settings_is_read() {
    let config = read(
        r#"
run_dir = "/tmp/run"
state_dir = "/tmp/state"
cores = "0x5"
no_huge = true
poll = "adaptive"
drives = ["file:/srv/a.img", "nvme:0000:00:04.0"]
stop_timeout_s = 5
[nvmf]
listen = ["127.0.0.1:4420"]
[log]
level = "debug"
format = "json"
"#,
    )
    .unwrap();
    assert_eq!(config.cores, [0, 2]);
    assert_eq!(config.poll, Poll::Adaptive);
    assert_eq!(config.mem_mib, Some(MEM_MIB_NO_HUGE), "no_huge needs a size");
    assert_eq!(config.drives.len(), 2);
    assert_eq!(config.nvmf_listen, ["127.0.0.1:4420".parse().unwrap()]);
    assert_eq!(config.log_format, LogFormat::Json);
    assert_eq!(config.rpc_socket(), Path::new("/tmp/run/penstockd.sock"));
}

#[test]
fn file_errors_name_line_and_what_would_be_right() {
    for (text, line, part) in [
        ("cores = \"0\"\ncoers = \"1\"\n", 2, "coers"),
        ("\n\ncores = \"x\"\n", 3, "mask such as 0x3"),
        ("cores = \"3-1\"", 1, "backwards"),
        ("cores = 1", 1, "string"),
        ("poll = \"lazy\"", 1, "busy"),
        ("mem_mib = 100", 1, "448"),
        ("run_dir = \"run\"", 1, "absolute"),
        ("drives = [\n\"file:/a\",\n\"disk:/b\"]", 3, "not a kind of drive"),
        ("[nvmf]\nlisten = [\"localhost\"]", 2, "127.0.0.1:4420"),
        ("[log]\nlevel = \"loud\"", 2, "info"),
        ("stop_timeout_s = 0", 1, "a second or more"),
        ("run_dir = ", 1, ""),
    ] {
        let error = read(text).unwrap_err();
        let ConfigError::Wrong { place, .. } = &error else { panic!("{error}") };
        assert_eq!(*place, Place::File { path: "/etc/p.toml".into(), line }, "{text:?}: {error}");
        assert!(error.to_string().contains(part), "{text:?}: {error}");
    }
}

#[test]
fn peers_are_read_and_what_they_need_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let key = dir.path().join("key");
    std::fs::write(&key, "ab".repeat(32)).unwrap();
    std::fs::set_permissions(&key, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let key = format!("cluster_key_file = \"{}\"\n", key.display());
    let peer = "[[peer]]\nnode = \"0194a5c1-b2d3-8002-8000-000000000000\"\naddress = \"10.0.0.2:4700\"\n";
    let config = read(&format!("peer_listen = \"10.0.0.1:4700\"\n{key}{peer}")).unwrap();
    assert_eq!(config.peer_listen, Some("10.0.0.1:4700".parse().unwrap()));
    assert_eq!(config.peers, [parse_peer("0194a5c1-b2d3-8002-8000-000000000000=10.0.0.2:4700").unwrap()]);
    assert!(!format!("{config:?}").contains("abab"), "a key is not printed");
    for (text, line, part) in [
        ("\npeer_listen = \"10.0.0.1:4700\"\n".to_owned(), 2, "cluster_key_file"),
        (format!("{key}{peer}"), 3, "peer_listen"),
        (format!("{key}peer_listen = \"10.0.0.1\"\n"), 2, "10.0.0.1:4700"),
        (format!("{key}peer_listen = \"10.0.0.1:65535\"\ncores = \"0-1\"\n"), 2, "next port"),
        (format!("{key}peer_listen = \"10.0.0.1:0\"\n"), 2, "fixed port"),
        (format!("{key}{}", peer.replace("8002", "4002")), 3, "version 4"),
        ("cluster_key_file = \"/nonexistent/key\"\n".to_owned(), 1, "/dev/urandom"),
    ] {
        let error = read(&text).unwrap_err();
        let ConfigError::Wrong { place, .. } = &error else { panic!("{error}") };
        assert_eq!(*place, Place::File { path: "/etc/p.toml".into(), line }, "{text:?}: {error}");
        assert!(error.to_string().contains(part), "{text:?}: {error}");
    }
    assert!(parse_peer("10.0.0.2:4700").unwrap_err().contains("NODE=ADDRESS"));
}

#[test]
fn flags_override_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p.toml");
    std::fs::write(&path, "cores = \"0\"\nno_huge = true\nmem_mib = 500\n[nvmf]\nlisten = [\"127.0.0.1:1\"]\n").unwrap();
    let flags =
        Flags { config: Some(path), cores: Some("1-2".to_owned()), nvmf_listen: vec!["127.0.0.1:2".parse().unwrap()], ..Flags::default() };
    let config = Config::resolve(&flags).unwrap();
    assert_eq!((config.cores.as_slice(), config.mem_mib), ([1, 2].as_slice(), Some(500)));
    assert_eq!(config.nvmf_listen, ["127.0.0.1:2".parse().unwrap()]);
}

#[test]
fn flag_errors_name_the_flag() {
    let error = Config::resolve(&Flags { cores: Some("two".to_owned()), ..Flags::default() }).unwrap_err();
    assert!(error.to_string().starts_with("flag --cores: "), "{error}");
    let error = Config::resolve(&Flags { config: Some("/nonexistent/p.toml".into()), ..Flags::default() }).unwrap_err();
    assert!(error.to_string().contains("/nonexistent/p.toml"), "{error}");
}

#[test]
fn run_dir_too_long_for_a_socket_is_refused() {
    let error = read(&format!("run_dir = \"/{}\"", "x".repeat(100))).unwrap_err();
    assert!(error.to_string().contains("shorter path"), "{error}");
}

#[test]
fn help_parses_and_shows_examples() {
    use clap::CommandFactory;
    Flags::command().debug_assert();
    let help = Flags::command().render_long_help().to_string();
    assert!(help.contains("--check-config") && help.contains("Examples:"), "{help}");
}

proptest! {
    #[test]
    fn any_text_is_read_or_refused(text in "\\PC{0,200}") {
        let _ = read(&text);
    }
    #[test]
    fn any_cores_are_read_or_refused(text in "[0-9a-fx,\\-\\[\\] ]{0,20}") {
        if let Ok(cores) = parse_cores(&text) {
            prop_assert!(!cores.is_empty());
            prop_assert!(cores.is_sorted_by(|a, b| a < b));
        }
    }
}
