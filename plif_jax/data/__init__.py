"""Data sets, from the user's files or a download to arrays ready for the devices."""


def load(config, progress=True, to_train=True):
    """The data set that a `plif_jax.config.Config` names, as a `plif_jax.data.dataset.Dataset`.

    `to_train` refuses event data of which a split is missing before anything is prepared; to evaluate, the test
    recordings suffice.

    Raises:
      UserError: it is not there and cannot be fetched, or a file of it is damaged; the line says which.
    """
    from plif_jax.data import events, images

    if not config.facts.events:
        return images.load(config.dataset_name, config.data_root, config.cache_dir, progress=progress)
    return events.load(
        config.dataset_name,
        config.data_root,
        config.cache_dir,
        T=config.T,
        split_by=config.split_by,
        normalization=config.normalization,
        cifar10dvs_split=config.cifar10dvs_split,
        progress=progress,
        to_train=to_train,
    )
