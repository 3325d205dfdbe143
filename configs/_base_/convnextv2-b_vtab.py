# ConvNeXt-V2-B on the tasks of VTAB-1k. The backbone is frozen here; the configs that inherit this one say what of it
# trains. --cfg-options task=NAME protocol=NAME merges one of `choices` each; see docs/vtab.md.
_base_ = ['mmpretrain::_base_/default_runtime.py']
custom_imports = dict(imports=['liera_mm'], allow_failed_imports=False)

tasks = dict(  # number of classes
    natural=dict(
        caltech101=102, cifar=100, dtd=47, oxford_flowers102=102, oxford_iiit_pet=37, svhn=10, sun397=397),
    specialized=dict(patch_camelyon=2, eurosat=10, resisc45=45, diabetic_retinopathy=5),
    structured=dict(
        clevr_count=8, clevr_dist=6, dmlab=6, kitti=4, dsprites_loc=16, dsprites_ori=16, smallnorb_azi=18,
        smallnorb_ele=9))
protocols = dict(  # files of the images to train on, and to evaluate
    final=dict(train='train800val200.txt', test='test.txt'),
    search=dict(train='train800.txt', test='val200.txt'))
task, protocol = 'cifar', 'final'
data_root = 'data/vtab/'

# The paper does not say which weights. Its 92 % on Pets from 1,000 images need a backbone that has seen labels: FCMAE
# fine-tuned on ImageNet-1k.
checkpoint = 'https://download.openmmlab.com/mmclassification/v0/convnext-v2/convnext-v2-base_fcmae-pre_3rdparty_in1k_20230104-00a70fa4.pth'
model = dict(
    type='ImageClassifier',
    data_preprocessor=dict(mean=[0., 0., 0.], std=[255., 255., 255.], to_rgb=True),  # "unnormalized inputs", section 7
    backbone=dict(
        type='LieRAConvNeXt',
        arch='base',
        drop_path_rate=0.1,  # the paper gives none; this is mmpretrain's for this backbone
        layer_scale_init_value=0.,
        use_grn=True,
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint, prefix='backbone.')),
    head=dict(type='LinearClsHead', num_classes=tasks['natural'][task], in_channels=1024, topk=(1, )))

pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(224, 224), interpolation='bicubic', backend='pillow'),
    dict(type='PackInputs')
]
train_dataloader = dict(
    batch_size=64,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='CustomDataset', data_root=data_root + task, ann_file=protocols[protocol]['train'], pipeline=pipeline))
val_dataloader = dict(
    batch_size=64,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='CustomDataset',
        data_root=data_root + task,
        ann_file=protocols[protocol]['test'],
        test_mode=True,
        pipeline=pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(type='Accuracy', topk=(1, ))
test_evaluator = val_evaluator

choices = dict(
    task={
        name: dict(
            model=dict(head=dict(num_classes=classes)),
            train_dataloader=dict(dataset=dict(data_root=data_root + name)),
            val_dataloader=dict(dataset=dict(data_root=data_root + name)),
            test_dataloader=dict(dataset=dict(data_root=data_root + name)))
        for group in tasks.values() for name, classes in group.items()
    },
    protocol={
        name: dict(
            train_dataloader=dict(dataset=dict(ann_file=files['train'])),
            val_dataloader=dict(dataset=dict(ann_file=files['test'])),
            test_dataloader=dict(dataset=dict(ann_file=files['test'])))
        for name, files in protocols.items()
    })

# The paper gives no schedule for VTAB-1k; this is the one of FacT, whose protocol it follows: AdamW, 100 epochs of which
# 10 warm up, batch 64
max_epochs = 100
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3, weight_decay=1e-4))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=True, begin=0, end=10, convert_to_iter_based=True),
    dict(
        type='CosineAnnealingLR',
        by_epoch=True,
        begin=10,
        end=max_epochs,
        eta_min_ratio=0.01,
        convert_to_iter_based=True)
]
auto_scale_lr = dict(base_batch_size=64)
# Evaluated once, at the end: the test images choose nothing
train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=max_epochs)
val_cfg = dict()
test_cfg = dict()

default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=10, max_keep_ckpts=1))
custom_hooks = [dict(type='LieRAHook')]
