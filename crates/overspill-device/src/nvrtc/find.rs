//! Where the compiler's library may be.

use std::{
    collections::BTreeSet,
    env, fs,
    path::{Path, PathBuf},
};

/// Names a folder to look in before all others.
pub const FOLDER_VARIABLE: &str = "OVERSPILL_NVRTC_DIR";

/// One library, and the builtins that it loads by name and would not find by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// `libnvrtc.so.N`.
    pub nvrtc: PathBuf,
    /// `libnvrtc-builtins.so.N.M` beside it.
    pub builtins: Option<PathBuf>,
}

/// The libraries found, best first: `folder`, the environment, what the process has loaded already
/// (PyTorch's), a virtual environment, a toolkit.
#[must_use]
pub fn candidates(folder: Option<&Path>) -> Vec<Candidate> {
    let mut folders: Vec<PathBuf> = folder.map(Path::to_owned).into_iter().collect();
    folders.extend(env::var_os(FOLDER_VARIABLE).map(PathBuf::from));
    folders.extend(loaded_folders(&fs::read_to_string("/proc/self/maps").unwrap_or_default()));
    if let Some(root) = env::var_os("VIRTUAL_ENV") {
        folders.extend(
            entries(&Path::new(&root).join("lib"))
                .flat_map(|python| package_folders(&python.join("site-packages"))),
        );
    }
    for variable in ["CUDA_HOME", "CUDA_PATH"] {
        folders.extend(env::var_os(variable).map(|root| Path::new(&root).join("lib64")));
    }
    folders.push("/usr/local/cuda/lib64".into());
    let mut seen = BTreeSet::new();
    folders.retain(|folder| seen.insert(folder.clone()));
    folders.iter().filter_map(|folder| in_folder(folder)).collect()
}

/// The newest library of a folder.
fn in_folder(folder: &Path) -> Option<Candidate> {
    let newest = |prefix: &str| {
        entries(folder)
            .filter_map(|path| {
                let version = path.file_name()?.to_str()?.strip_prefix(prefix)?;
                let numbers: Result<Vec<u32>, _> = version.split('.').map(str::parse).collect();
                Some((numbers.ok()?, path.clone()))
            })
            .max()
            .map(|(_, path)| path)
    };
    Some(Candidate { nvrtc: newest("libnvrtc.so.")?, builtins: newest("libnvrtc-builtins.so.") })
}

/// Folders beside the libraries that a process has mapped.
fn loaded_folders(maps: &str) -> Vec<PathBuf> {
    let mapped: BTreeSet<&Path> =
        maps.lines().filter_map(|line| Some(Path::new(&line[line.find('/')?..]))).collect();
    let named = |path: &Path, prefix: &str| {
        path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(prefix))
    };
    let own = mapped.iter().filter(|path| named(path, "libnvrtc.so")).filter_map(|path| path.parent());
    let torch =
        mapped.iter().filter(|path| named(path, "libtorch")).filter_map(|path| path.ancestors().nth(3));
    own.map(Path::to_owned).chain(torch.flat_map(package_folders)).collect()
}

/// Where the wheels put it, below a `site-packages`.
fn package_folders(packages: &Path) -> Vec<PathBuf> {
    ["nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib", "torch/lib"].map(|folder| packages.join(folder)).into()
}

fn entries(folder: &Path) -> impl Iterator<Item = PathBuf> {
    fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looks_beside_the_libraries_of_torch() {
        let maps = "7f00-7f01 r-xp 0 08:01 1  /env/lib/python3.12/site-packages/torch/lib/libtorch_cpu.so\n\
            7f01-7f02 rw-p 0 00:00 0 \n\
            7f02-7f03 r-xp 0 08:01 2  /opt/cuda/lib64/libnvrtc.so.13\n";
        let packages = Path::new("/env/lib/python3.12/site-packages");
        let mut expected = vec![PathBuf::from("/opt/cuda/lib64")];
        expected.extend(package_folders(packages));
        assert_eq!(loaded_folders(maps), expected);
        assert_eq!(loaded_folders(""), Vec::<PathBuf>::new());
    }

    #[test]
    fn takes_the_newest_and_its_builtins_and_nothing_else() {
        let folder = env::temp_dir().join(format!("overspill-nvrtc-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("folder");
        for name in [
            "libnvrtc.so.12",
            "libnvrtc.so.13",
            "libnvrtc.alt.so.13",
            "libnvrtc-builtins.so.13.0",
            "libnvrtc-builtins.alt.so.13.0",
        ] {
            fs::write(folder.join(name), b"").expect("file");
        }
        let found = in_folder(&folder);
        fs::remove_dir_all(&folder).expect("folder");
        let found = found.expect("found");
        assert_eq!(found.nvrtc, folder.join("libnvrtc.so.13"));
        assert_eq!(found.builtins, Some(folder.join("libnvrtc-builtins.so.13.0")));
        assert_eq!(in_folder(Path::new("/does/not/exist")), None);
    }
}
