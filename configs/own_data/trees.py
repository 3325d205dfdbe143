# Tree crowns, the example of docs/own_data.md. For data of your own, copy this file and change the paths; times are how
# often an epoch shows each image: such that it has about 60 batches of 4
_base_ = '../_base_/faster-rcnn_mobilenetv2_own-data.py'

data_root = 'data/trees/'
train = dict(data_root=data_root, ann_file='annotations/instances_train2017.json', data_prefix=dict(img='train2017/'))
val = dict(data_root=data_root, ann_file='annotations/instances_val2017.json', data_prefix=dict(img='val2017/'))
test = dict(data_root=data_root, ann_file='annotations/instances_test2017.json', data_prefix=dict(img='test2017/'))
train_dataloader = dict(dataset=dict(times=7, dataset=train))
val_dataloader = dict(dataset=val)
test_dataloader = dict(dataset=test)
val_evaluator = dict(ann_file=data_root + val['ann_file'])
test_evaluator = dict(ann_file=data_root + test['ann_file'])
